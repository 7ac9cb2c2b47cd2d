//! `necp except`: flows that this server does not want.

use std::net::IpAddr;
use std::process::ExitCode;

use super::{Common, fail, fetch, judge, print, render, tell};
use crate::daemon::se::protocol::{NeAnswer, Request};
use crate::daemon::se::words::{Ports, Prefix, ScopeName, Ttl};
use crate::necp::Scope;

/// `necp except`: exceptions, which are flows that the network elements shall not send to this server though it serves
/// them (local), or to no server of the farm (global: they go on to where they were sent, as if there were no balancer).
/// New flows only; those in progress stay.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp except add --src 203.0.113.0/24                         no clients of that network here
  necp except add --dst 198.51.100.7 --port tcp/80 --ttl 300 --scope global
                                                               that origin is reached directly for 5 minutes
  necp except add --src 2001:db8:7::/48 --dst 2001:db8::7      of an agent that has joined over IPv6
  necp except list --scope global
  necp except del --dst 198.51.100.7 --port tcp/80
  necp except reset

A session over IPv6 is about IPv6 flows, one over IPv4 about IPv4 flows: an exception is asked for in those of its family, and
refused if there is none. A network element that knows nothing of exceptions of IPv6 refuses them.

Exceptions are the agent's: they are installed again when a network element comes back, and are gone when the agent ends
or is restarted.

Exit codes: 0 every network element has done it, 1 one has refused or is away (it is named), or no agent answers.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Add an exception, or replace the one for the same flows
    Add(Add),
    /// Delete the exception of this server for exactly these flows; one that does not exist counts as deleted
    Del(Del),
    /// Delete all exceptions of this server
    Reset(Reset),
    /// List the exceptions in force, of all servers, as each network element has them
    List(List),
}

/// Flows by what is the same in all of them.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = true)]
struct Selector {
    /// Source addresses: 203.0.113.0/24, 198.51.100.7, 2001:db8::/32 or any [default: any]
    #[arg(long, value_name = "PREFIX")]
    src: Option<Prefix>,
    /// Destination addresses, likewise [default: any]
    #[arg(long, value_name = "PREFIX")]
    dst: Option<Prefix>,
    /// Protocol and destination port: tcp/80, udp/53, tcp, icmp, ip/47 or any [default: any]
    #[arg(long, value_name = "PROTO[/PORT]")]
    port: Option<Ports>,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp except add --src 203.0.113.0/24 --dst 198.51.100.7 --port tcp/80 --ttl 300 --scope global
  necp except add --src any                   no new flow at all here (the services stay started)

A network element that does not trust this server with global exceptions takes one as local: `necp except list` shows the
scope in force.")]
struct Add {
    #[command(flatten)]
    flows: Selector,
    /// How long it lasts: seconds, 5m, 2h, 1d; 0 is until it is deleted, or the agent ends
    #[arg(long, value_name = "TIME", default_value = "0")]
    ttl: Ttl,
    /// local: not to this server; global: to no server of the farm
    #[arg(long, value_name = "SCOPE", default_value = "local")]
    scope: ScopeName,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  necp except del --src 203.0.113.0/24 --dst 198.51.100.7 --port tcp/80")]
struct Del {
    #[command(flatten)]
    flows: Selector,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, clap::Args)]
struct Reset {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp except list
  necp except list --installer 10.0.0.11 --scope global
  necp except list --json | jq '.[].entries[]?.dst'")]
struct List {
    /// Only with exactly this source
    #[arg(long, value_name = "PREFIX")]
    src: Option<Prefix>,
    /// Only with exactly this destination
    #[arg(long, value_name = "PREFIX")]
    dst: Option<Prefix>,
    /// Only of this protocol, and port if there is one
    #[arg(long, value_name = "PROTO[/PORT]")]
    port: Option<Ports>,
    /// Only with this scope in force: local or global
    #[arg(long, value_name = "SCOPE")]
    scope: Option<ScopeName>,
    /// Only of the server with this address
    #[arg(long, value_name = "ADDR")]
    installer: Option<IpAddr>,
    #[command(flatten)]
    common: Common,
}

/// Asks the agent, prints, and says how it went.
pub fn run(args: Args) -> ExitCode {
    match args.command {
        Command::Add(Add { flows, ttl, scope, common }) => add(flows, ttl, scope, &common),
        Command::Del(Del { flows, common }) => {
            let (src, dst, port) = flows.parts();
            tell(&common, &Request::ExceptDel { src, dst, port })
        }
        Command::Reset(Reset { common }) => tell(&common, &Request::ExceptReset),
        Command::List(list) => show(list),
    }
}

impl Selector {
    fn parts(&self) -> (Prefix, Prefix, Ports) {
        (self.src.unwrap_or_default(), self.dst.unwrap_or_default(), self.port.unwrap_or_default())
    }
}

fn add(flows: Selector, ttl: Ttl, scope: ScopeName, common: &Common) -> ExitCode {
    let (src, dst, port) = flows.parts();
    if (src, dst, port.protocol, scope.0) == (Prefix::ANY, Prefix::ANY, 0, Scope::Global) {
        return fail("every flow cannot be a global exception: nobody may switch a whole farm off; use --scope local");
    }
    tell(common, &Request::ExceptAdd { src, dst, port, ttl: ttl.0, scope })
}

fn show(list: List) -> ExitCode {
    let List { src, dst, port, scope, installer, common } = list;
    let request = Request::ExceptList { src, dst, port, scope, installer };
    match fetch::<Vec<NeAnswer>>(&common.socket, &request, "answers") {
        Ok((value, answers)) => {
            print(&if common.json { format!("{value:#}") } else { render::listing(&answers) });
            judge(&answers)
        }
        Err(error) => fail(error),
    }
}
