//! The protocol chapter (`necp-user/docs/protocol.md`) does what it says: its server element joins the real daemon, and
//! its example of a credential is one of the messages written by hand.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use necp_tests::{
    conversation::all_answer,
    hand::Hand,
    line::{Line, farm, top},
    process::Process,
    topology::{NE, Topology, VIP},
};

const PAGE: &str = include_str!("../../necp-user/docs/protocol.md");
const MESSAGES: &str = include_str!("../../necp-user/src/necp/vectors/messages.txt");
const SOON: Duration = Duration::from_secs(20);
const KEY: &str = "a secret of more than 16 bytes";

fn program() -> Result<&'static str> {
    let (_, rest) = PAGE.split_once("```python\n").context("the page has a program")?;
    Ok(rest.split_once("```").context("which ends")?.0)
}

/// Runs the page's program on the first server; `keyed` says whether it has a key.
fn serve(line: &Line, dir: &std::path::Path, keyed: bool) -> Result<Process> {
    let script = dir.join("se.py");
    fs::write(&script, program()?)?;
    let mut python = line.bed().server(0).ns().command("python3");
    python.arg(&script).arg(NE.to_string()).arg("7");
    if keyed {
        python.env("NECP_KEY", KEY);
    }
    Process::spawn(python, "se.py", dir)
}

#[test]
fn the_server_element_in_python_joins_serves_and_leaves() -> Result<()> {
    let mut line =
        Line::start(Topology::builder().servers(2).build()?, &(top(0.5) + &farm("web", VIP, &["10.0.0.0/24"], "")))?;
    let dir = tempfile::tempdir()?;
    let mut se = serve(&line, dir.path(), false)?;
    se.wait_for_log("START acknowledged", SOON)?;
    line.wait_for_state(0, "up")?;
    // It serves TCP only.
    let mut talk = line.talk(20)?;
    assert!(talk.iter().all(|one| one.server() == "s1"));
    // It lives by answering: three unanswered keepalives would be 1.5 s.
    std::thread::sleep(Duration::from_secs(4));
    assert!(se.ended().is_none(), "{}", se.log());
    all_answer("four seconds later", &mut talk)?;
    assert!(line.talk(20)?.iter().all(|one| one.server() == "s1"));
    let status = se.terminate(SOON)?;
    assert!(status.success() && se.log().contains("STOP acknowledged"), "{status} {}", se.log());
    Ok(())
}

#[test]
fn the_server_element_in_python_authenticates() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("key");
    fs::write(&file, KEY)?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&file, private)?;
    let farm = farm("web", VIP, &["10.0.0.0/24"], "").replace("auth = \"none\"", &format!("key_file = {file:?}"));
    let mut line = Line::start(Topology::builder().servers(2).build()?, &(top(0.5) + &farm))?;
    assert!(Hand::join(line.bed().server(1).ns(), NE).is_err(), "authentication is required");
    let mut se = serve(&line, dir.path(), true)?;
    se.wait_for_log("START acknowledged", SOON)?;
    line.wait_for_state(0, "up")?;
    std::thread::sleep(Duration::from_secs(3));
    assert!(se.ended().is_none(), "{}", se.log());
    let status = se.terminate(SOON)?;
    assert!(status.success() && se.log().contains("STOP acknowledged"), "{status} {}", se.log());
    Ok(())
}

/// The example's bytes are those of `auth-start`, whose credential was computed apart from our code.
#[test]
fn the_pages_example_is_a_message_written_by_hand() -> Result<()> {
    let digits = |text: &str| text.chars().filter(char::is_ascii_hexdigit).collect::<String>();
    let (_, rest) = PAGE.split_once("0x4444444455555556\n").context("the page has the example")?;
    let example = digits(rest.split_once("```").context("which ends")?.0);
    let (_, rest) = MESSAGES.split_once("\nauth-start §5.8.1 SE>NE\n").context("the file has the message")?;
    let written: String = rest.lines().take(3).map(|line| digits(line.split('=').next().unwrap_or_default())).collect();
    assert_eq!(example, written);
    assert_eq!(example.len(), 2 * 72);
    Ok(())
}
