//! A thousand sessions. Ten thousand are measured by `cargo xtask bench --sessions 10000`.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use necp_tests::scale::Scale;

/// The bounds are those of a daemon that was built without optimisation.
fn hold(services: u16) -> Result<()> {
    let watch = Duration::from_secs(10);
    let floor = Some(PathBuf::from(env!("CARGO_BIN_EXE_necp-scale")));
    let keepalive = Duration::from_secs(5);
    let figures = Scale { sessions: 1000, services, watch, keepalive, keys: false, floor }.run()?;
    println!("1000 sessions of {services} service(s)\n{figures}");
    ensure!(figures.lost == 0, "sessions were lost");
    ensure!(figures.memory <= 32 * 1024, "{} bytes a session", figures.memory);
    ensure!(figures.cpu <= 0.25, "{:.1} % of a core", figures.cpu * 100.0);
    ensure!(figures.floor.is_some_and(|floor| floor > 0.0), "no floor");
    ensure!(figures.status <= Duration::from_secs(1), "a status took {:?}", figures.status);
    ensure!(figures.returned <= Duration::from_secs(10), "back after {:?}", figures.returned);
    Ok(())
}

#[test]
fn a_thousand_servers_of_one_service() -> Result<()> {
    hold(1)
}

#[test]
fn a_thousand_servers_of_four_services() -> Result<()> {
    hold(4)
}
