//! What the balancer says of its servers: the fields of `necp status --json` that the play looks at.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The balancer's view of one server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// `up`, `lost`, `draining`, …
    pub state: String,
    /// Whether its next hop answers.
    pub reachable: bool,
    /// Its last health index.
    pub health: Option<u64>,
    /// Its weight; 0: no new connections.
    pub weight: u64,
    /// Its part of the slot table in per cent.
    pub slots_percent: f64,
    /// Flows on record for it.
    pub records: u64,
}

impl Standing {
    /// Does the balancer send it new connections?
    pub fn serves(&self) -> bool {
        self.weight > 0 && self.slots_percent > 0.0 && !self.is_lost()
    }

    /// Has the balancer declared it lost?
    pub fn is_lost(&self) -> bool {
        matches!(self.state.as_str(), "lost" | "dead") || !self.reachable
    }
}

/// Asks the balancer over its socket, as `necp status` does: the standing of each of these servers, none for those
/// that it does not know.
///
/// # Errors
/// If the balancer does not answer within two seconds, or not in JSON.
pub fn fetch(socket: &Path, servers: &[Ipv4Addr]) -> Result<Vec<Option<Standing>>> {
    let mut stream = UnixStream::connect(socket).context("the balancer's socket does not answer")?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"{\"command\":\"status\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("the balancer does not answer")?;
    let answer: Value = serde_json::from_str(&line).context("the balancer's answer is no JSON")?;
    Ok(standings(&answer["status"], servers))
}

/// Of the ids of one server (an older one may have flows yet), the one with the largest weight counts, then the newest.
fn standings(status: &Value, servers: &[Ipv4Addr]) -> Vec<Option<Standing>> {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let services = array(&status["farms"]).into_iter().flat_map(|farm| array(&farm["services"]));
    let offers: Vec<Value> = services.flat_map(|service| array(&service["servers"])).collect();
    let of = |address: &Ipv4Addr| {
        let own = offers.iter().filter(|offer| offer["address"].as_str() == Some(address.to_string().as_str()));
        let best =
            own.max_by_key(|offer| (offer["weight"].as_u64(), offer["state"] != "dead", offer["id"].as_u64()))?;
        Some(Standing {
            state: best["state"].as_str().unwrap_or("?").to_owned(),
            reachable: best["reachable"].as_bool().unwrap_or(false),
            health: best["health"].as_u64(),
            weight: best["weight"].as_u64().unwrap_or(0),
            slots_percent: best["slots_percent"].as_f64().unwrap_or(0.0),
            records: best["flows_on_record"].as_u64().unwrap_or(0),
        })
    };
    servers.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_offer_in_force_counts() {
        let offer = |id: u32, address: &str, state: &str, weight: u32| {
            json!({"id": id, "address": address, "state": state, "reachable": true, "health": null, "weight": weight,
                   "slots_percent": f64::from(weight) / 1000.0, "flows_on_record": 3})
        };
        let servers =
            [offer(2, "10.0.0.11", "dead", 0), offer(5, "10.0.0.11", "up", 1000), offer(3, "10.0.0.12", "lost", 0)];
        let status = json!({"farms": [{"services": [{"servers": servers}]}]});
        let addresses = [11, 12, 13].map(|last| Ipv4Addr::new(10, 0, 0, last));
        let standings = standings(&status, &addresses);
        let [Some(first), Some(second), None] = standings.as_slice() else { panic!("{standings:?}") };
        assert!(first.serves() && !first.is_lost() && first.records == 3 && first.health.is_none());
        assert!(!second.serves() && second.is_lost());
    }
}
