//! The server's side by command: `necp drain`, `resume`, `health`, `except` and `status --agent`, against the real daemons.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use necp_tests::{
    conversation::all_answer,
    line::{Line, OFFERS, none_moved, one_farm},
    netns::wait_until,
    topology::Topology,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command of a server prints, if it succeeds.
fn done(line: &mut Line, index: usize, args: &[&str]) -> Result<String> {
    let Output { status, stdout, stderr } = line.agent(index).command(args)?;
    ensure!(status.success(), "`necp {}`: {status}\n{}{}", args.join(" "), text(&stdout), text(&stderr));
    Ok(text(&stdout))
}

/// What a command of a server says on its standard error, if it fails with exit code 1.
fn fails(line: &mut Line, index: usize, args: &[&str]) -> Result<(String, String)> {
    let Output { status, stdout, stderr } = line.agent(index).command(args)?;
    ensure!(status.code() == Some(1), "`necp {}`: {status}\n{}{}", args.join(" "), text(&stdout), text(&stderr));
    Ok((text(&stdout), text(&stderr)))
}

#[test]
fn drained_and_resumed_by_command() -> Result<()> {
    let mut line = Line::with_servers(2, 1.0)?;
    let (mut talk, mut echo) = (line.talk(60)?, line.echo(60)?);
    let told = done(&mut line, 0, &["drain"])?;
    assert_eq!(told, "  NETWORK ELEMENT  RESULT\n  10.0.0.1:3262    accepted\n");
    // From the acknowledgement on, not a moment later.
    line.expect_new_flows_at("s1 is drained", &["s2"])?;
    all_answer("s1 is drained", &mut talk)?;
    none_moved("s1 is drained", &mut echo)?;
    let (_, error) = fails(&mut line, 0, &["drain", "--wait", "0.5"])?;
    assert!(error.contains("connections are left after 0.5 s"), "{error}");
    let shown = done(&mut line, 0, &["status", "--agent"])?;
    assert!(shown.contains(", drained: tcp/7=l2 udp/53=l2, ") && shown.contains("  drained  "), "{shown}");

    talk.retain(|one| one.server() != "s1");
    done(&mut line, 0, &["drain", "--wait", "10"])?;
    ensure!(line.agent(0).process().ended().is_none(), "the agent goes on");
    done(&mut line, 0, &["resume"])?;
    line.wait_until_serving(0)?;
    talk.push(line.talk_until("s1")?);
    all_answer("s1 is back", &mut talk)?;
    none_moved("s1 is back", &mut echo)
}

#[test]
fn health_by_command() -> Result<()> {
    let mut line = Line::with_servers(2, 0.5)?;
    let mut talk = line.talk(40)?;
    assert_eq!(done(&mut line, 0, &["health"])?, "health 100 (constant:100)\n");
    let set = done(&mut line, 0, &["health", "0"])?;
    assert_eq!(set, "health 0 (set by `necp health`; constant:100 says 100)\n");
    line.wait_for_row(0, "has weight 0", |row| row["health"] == 0 && row["weight"] == 0 && row["slots"] == 0)?;
    line.expect_new_flows_at("s1 is at 0", &["s2"])?;
    all_answer("s1 is at 0", &mut talk)?;
    done(&mut line, 0, &["health", "40"])?;
    line.wait_for_row(0, "is at 40", |row| row["health"] == 40)?;
    done(&mut line, 0, &["health", "auto"])?;
    line.wait_for_row(0, "is at 100 again", |row| row["health"] == 100)?;
    let output = line.agent(0).command(&["health", "101"])?;
    assert_eq!(output.status.code(), Some(2), "a usage error: {}", text(&output.stderr));
    Ok(())
}

/// The entries that every server's agent shows, as the only network element has them.
fn entries(line: &mut Line, index: usize, args: &[&str]) -> Result<Vec<Value>> {
    let args: Vec<&str> = ["except", "list", "--json"].iter().chain(args).copied().collect();
    let answers: Value = serde_json::from_str(&done(line, index, &args)?)?;
    answers[0]["entries"].as_array().cloned().with_context(|| format!("no entries in {answers}"))
}

#[test]
fn exceptions_by_command() -> Result<()> {
    let mut line =
        Line::start(Topology::builder().servers(2).build()?, &(one_farm(1.0) + "global_exceptions = true\n"))?;
    line.join_all(0..2)?;
    let add = ["except", "add", "--src", "203.0.113.9/24", "--dst", "198.51.100.7", "--port", "tcp/80"];
    let told = done(&mut line, 0, &[&add[..], &["--ttl", "300", "--scope", "global"]].concat())?;
    assert_eq!(told, "  NETWORK ELEMENT  RESULT\n  10.0.0.1:3262    accepted\n");
    done(&mut line, 1, &["except", "add", "--src", "203.0.113.0/24"])?;
    let listed = done(&mut line, 1, &["except", "list"])?;
    let expected = "  NETWORK ELEMENT  INSTALLER  SCOPE   SRC             DST           PORT
  10.0.0.1:3262    10.0.0.11  global  203.0.113.0/24  198.51.100.7  tcp/80
  10.0.0.1:3262    10.0.0.12  local   203.0.113.0/24  any           any
";
    assert_eq!(listed, expected);
    assert_eq!(entries(&mut line, 0, &["--installer", "10.0.0.12"])?.len(), 1);
    assert_eq!(entries(&mut line, 0, &["--scope", "global", "--port", "tcp/80"])?[0]["installer"], "10.0.0.11");
    assert_eq!(entries(&mut line, 0, &["--src", "203.0.113.0/25"])?.len(), 0);

    // Each one's own alone.
    let del = ["except", "del", "--src", "203.0.113.0/24"];
    done(&mut line, 0, &del)?;
    assert_eq!(entries(&mut line, 0, &[])?.len(), 2);
    done(&mut line, 1, &del)?;
    assert_eq!(entries(&mut line, 0, &[])?.len(), 1);

    // A network element that comes back is told again what is left; one that is away is named.
    line.kill_ne();
    let (told, error) = fails(&mut line, 0, &["except", "add", "--dst", "198.51.100.8", "--ttl", "1h"])?;
    assert!(told.contains("away, will be told when it is back") && error.contains("10.0.0.1:3262"), "{told}{error}");
    line.restart_ne()?;
    line.wait_until_serving(0)?;
    wait_until("both are told again", SOON, || {
        entries(&mut line, 0, &["--installer", "10.0.0.11"]).is_ok_and(|entries| entries.len() == 2)
    })?;
    done(&mut line, 0, &["except", "reset"])?;
    assert_eq!(entries(&mut line, 0, &[])?, Vec::<Value>::new());

    // What the commands installed ends with the agent.
    done(&mut line, 0, &add)?;
    line.kill_agent(0);
    line.start_agent(0, &OFFERS, &[])?;
    line.wait_until_serving(0)?;
    assert_eq!(entries(&mut line, 0, &[])?, Vec::<Value>::new());
    Ok(())
}

#[test]
fn commands_without_an_agent_say_what_to_do() -> Result<()> {
    let mut line = Line::with_servers(1, 1.0)?;
    line.agent(0).process().terminate(SOON)?;
    for args in [&["drain"][..], &["resume"], &["health"], &["except", "list"], &["status", "--agent"]] {
        let (told, error) = fails(&mut line, 0, args)?;
        assert_eq!(told, "");
        assert!(error.starts_with("necp: no agent answers at ") && error.contains("is `necp se` running?"), "{error}");
    }
    Ok(())
}
