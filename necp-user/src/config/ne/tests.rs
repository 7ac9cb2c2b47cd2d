//! A good file, and every mistake with its place and text.

use super::*;

const GOOD: &str = r#"interfaces = ["eth0"]
listen = ["0.0.0.0:3262"]

[[farm]]
name = "web"
vips = ["192.0.2.10"]
services = ["tcp/80", "tcp/443", "udp/443"]
forwarding = ["l2", "gre", "l3"]      # what servers may ask for
servers = ["10.0.0.0/24"]             # who may join
auth = "none"
"#;

/// The mistakes in GOOD after a replacement, which must hit.
fn mistakes(from: &str, to: &str) -> Vec<String> {
    assert!(GOOD.contains(from), "{from:?} is not in the text");
    let changed = GOOD.replacen(from, to, 1);
    NeConfig::parse(&changed).expect_err(&changed).iter().map(Mistake::to_string).collect()
}

/// GOOD with more keys of the farm.
fn with(keys: &str) -> Vec<String> {
    mistakes("auth = \"none\"\n", &format!("auth = \"none\"\n{keys}\n"))
}

fn only(found: Vec<String>, expected: &str) {
    assert_eq!(found, [expected]);
}

#[test]
fn the_example_is_read_with_its_defaults() {
    let config = NeConfig::parse(GOOD).expect("no mistake in it");
    assert_eq!(config.interfaces, ["eth0"]);
    assert_eq!(config.listen, ["0.0.0.0:3262".parse().expect("an address")]);
    let default = NeConfig::parse(&GOOD.replacen("listen = [\"0.0.0.0:3262\"]", "", 1)).expect("no mistake in it");
    let default: Vec<String> = default.listens_on().iter().map(ToString::to_string).collect();
    assert_eq!(default, ["0.0.0.0:3262", "[::]:3262"]);
    assert_eq!((config.pin.as_path(), config.socket.as_path()), (Path::new(PIN), Path::new(SOCKET)));
    assert_eq!((config.mode, config.manage_vips), (Mode::Auto, true));
    assert_eq!((config.keepalive, config.grace), (Duration::from_secs(5), Duration::from_secs(60)));
    let farm = &config.farms[0];
    assert_eq!((farm.table_size, farm.udp_tracking, farm.global_exceptions), (65_537, true, false));
    assert_eq!((config.max_exceptions, farm.max_exceptions), (1_048_576, 65_536));
    assert_eq!(farm.forwarding, Forwarding::ALL);
    assert_eq!((farm.tcp_idle.as_secs(), farm.udp_idle.as_secs(), farm.orphan_time.as_secs()), (7440, 180, 300));
    assert_eq!(config.admits([10, 0, 0, 11].into()), Some(0));
    assert_eq!(config.admits([10, 0, 1, 11].into()), None);
    assert_eq!(config.slots(), 3 * 65_537);
    let notes: Vec<String> = config.notes.iter().map(Mistake::to_string).collect();
    only(notes, "8:14: with l3 every flow of farm `web` is on record, those by other types too");
    assert_eq!(
        farm.to_string(),
        "web: tcp/80 tcp/443 udp/443 on 192.0.2.10 by l2 gre l3, servers 10.0.0.0/24, 65537 slots per service, auth none"
    );
}

#[test]
fn every_optional_key_is_read() {
    let top = "interfaces = [\"eth0\", \"eth1\"]\nlisten = [\"10.0.0.1\", \"10.0.1.1:4000\"]\npin = \"/sys/fs/bpf/b\"\n\
               socket = \"/run/b.sock\"\nmode = \"native\"\nmanage_vips = false\nkeepalive = 1\ngrace = 2.5\n\
               max_exceptions = 5000\n";
    let text = GOOD
        .replace(", \"l3\"", "")
        .split_once("[[farm]]")
        .map(|(_, farm)| format!("{top}[[farm]]{farm}"))
        .expect("a farm")
        + "table_size = 251\norphan_time = 10\ntcp_idle = 60\nudp_idle = 1.5\nudp_tracking = false\necho = false\n\
           global_exceptions = true\nmax_exceptions = 1000\nhash_seed = 7\ncapacity = { \"10.0.0.11\" = 2 }\n";
    let config = NeConfig::parse(&text).expect("no mistake in it");
    assert_eq!(config.listen.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.1:3262", "10.0.1.1:4000"]);
    assert_eq!((config.mode, config.manage_vips), (Mode::Native, false));
    assert_eq!((config.keepalive.as_millis(), config.grace.as_millis()), (1000, 2500));
    let farm = &config.farms[0];
    assert_eq!((farm.table_size, farm.hash_seed, farm.udp_tracking, farm.echo), (251, Some(7), false, false));
    assert_eq!(farm.capacity, BTreeMap::from([([10, 0, 0, 11].into(), 2.0)]));
    assert_eq!(farm.udp_idle.as_millis(), 1500);
    assert_eq!((config.max_exceptions, farm.max_exceptions, farm.global_exceptions), (5000, 1000, true));
}

const INTERCEPT: &str = "intercept = [\"0.0.0.0/0\"]";

#[test]
fn a_farm_intercepts_in_place_of_vips() {
    let good = GOOD.replace("vips = [\"192.0.2.10\"]", INTERCEPT).replace(", \"l3\"", "");
    let config = NeConfig::parse(&good).expect("no mistake in it");
    assert!(config.intercepts(Family::V4) && !config.intercepts(Family::V6) && config.farms[0].vips.is_empty());
    assert_eq!(
        config.farms[0].to_string(),
        "web: tcp/80 tcp/443 udp/443 on the way to 0.0.0.0/0 by l2 gre, servers 10.0.0.0/24, 65537 slots per service, auth none"
    );
    let vips = "vips = [\"192.0.2.10\"]";
    let both = mistakes(", \"l3\"]      #", "]\nintercept = [\"10.0.0.0/8\", \"10.0.0.0/8\"] #");
    assert_eq!(
        both,
        [
            "9:13: farm `web` has `vips` and `intercept`; make them two farms",
            "9:28: prefix 10.0.0.0/8 is listed twice; write it once",
        ]
    );
    let neither = mistakes(vips, "");
    assert_eq!(neither.len(), 1, "{neither:?}");
    assert!(neither[0].starts_with("5:8: farm `web` has neither `vips` nor `intercept`; write "), "{neither:?}");
    only(
        mistakes(vips, INTERCEPT),
        "8:28: l3 addresses packets to the server, which could not tell whom they were for; a farm with `intercept` has l2 and gre",
    );
    let prefix = |text: &str| NeConfig::parse(&good.replace("0.0.0.0/0", text)).expect_err(text)[0].to_string();
    assert_eq!(
        prefix("10.0.0.1/8"),
        "6:14: `10.0.0.1/8` has host bits set; write 10.0.0.0/8 (or 10.0.0.1/32 for that one address)"
    );
    assert_eq!(
        prefix("all"),
        "6:14: `all` is no prefix; write destinations to intercept as 0.0.0.0/0 or ::/0 (all), 203.0.113.0/24 or 2001:db8::/32"
    );
    let untracked = NeConfig::parse(&format!("{good}udp_tracking = false\n")).expect_err("a mistake");
    assert_eq!(
        untracked[0].to_string(),
        "6:13: what is intercepted is on record, so that exceptions hold; drop udp_tracking = false"
    );
    let second = good.split_once("[[farm]]").map(|(_, farm)| farm.replace("web", "b").replace("10.0.0.0", "10.0.1.0"));
    let two = NeConfig::parse(&format!("{good}[[farm]]{}", second.expect("a farm"))).expect_err("a mistake");
    assert_eq!(
        two[0].to_string(),
        "13:13: tcp/80 is intercepted by farm `web` already; give one of the two all prefixes, or `b` other services"
    );
}

#[test]
fn a_farm_intercepts_ipv6_too() {
    let good = GOOD.replace("vips = [\"192.0.2.10\"]", INTERCEPT).replace(", \"l3\"", "");
    let of = |prefixes: &str, servers: &str| {
        let text = good.replace("\"0.0.0.0/0\"", prefixes);
        NeConfig::parse(&text.replace("\"10.0.0.0/24\"", servers))
    };
    let both = of("\"0.0.0.0/0\", \"::/0\"", "\"10.0.0.0/24\", \"2001:db8::/64\"").expect("no mistake in it");
    assert!(both.intercepts(Family::V4) && both.intercepts(Family::V6) && both.serves(Family::V6));
    assert_eq!((both.farms[0].tables(), both.slots(), both.notes.len()), (6, 6 * 65_537, 0), "{:?}", both.notes);
    let six = of("\"::/0\"", "\"2001:db8::/64\"").expect("no mistake in it");
    assert!(!six.intercepts(Family::V4) && six.intercepts(Family::V6) && !six.serves(Family::V4));
    let note = |prefixes, servers| {
        let notes = of(prefixes, servers).expect("no mistake in it").notes;
        notes.iter().map(|note| note.to_string().split_once(": ").map(|(_, text)| text.to_owned())).collect::<Vec<_>>()
    };
    let nobody = "what farm `web` intercepts of IPv6 has no server: no prefix in `servers` is IPv6".to_owned();
    assert_eq!(note("\"0.0.0.0/0\", \"::/0\"", "\"10.0.0.0/24\""), [Some(nobody)]);
    let nothing = "servers in 2001:db8::/64 have nothing to serve: farm `web` intercepts no IPv6".to_owned();
    assert_eq!(note("\"0.0.0.0/0\"", "\"10.0.0.0/24\", \"2001:db8::/64\""), [Some(nothing)]);

    let mistake = |prefix: &str| of(&format!("\"{prefix}\""), "\"2001:db8::/64\"").expect_err(prefix)[0].to_string();
    assert_eq!(
        mistake("2001:db8::1/32"),
        "6:14: `2001:db8::1/32` has host bits set; write 2001:db8::/32 (or 2001:db8::1/128 for that one address)"
    );
    for near in ["fe80::/10", "fe80::1", "ff00::/8", "ff0e::/16"] {
        assert_eq!(
            mistake(near),
            format!(
                "6:14: `{near}` is link-local or multicast, which no router takes any further; write destinations such as \
                 ::/0 (all) or 2001:db8::/32"
            )
        );
    }
    assert!(mistake("::ffff:10.0.0.1").ends_with("is an IPv4 address in the form of IPv6; write it as 10.0.0.1"));

    // One service each of one family is no conflict.
    let second =
        good.replace("\"0.0.0.0/0\"", "\"::/0\"").replace("10.0.0.0/24", "2001:db8::/64").replace("web", "six");
    let second = second.split_once("[[farm]]").expect("a farm").1.to_owned();
    let two = NeConfig::parse(&format!("{good}[[farm]]{second}")).expect("no mistake in it");
    assert!(two.intercepts(Family::V4) && two.intercepts(Family::V6));
}

#[test]
fn unknown_keys_name_their_line_and_the_nearest_key() {
    only(mistakes("listen =", "listn ="), "2:1: unknown key `listn`; did you mean `listen`?");
    only(with("tablesize = 251"), "11:1: unknown key `tablesize`; did you mean `table_size`?");
}

#[test]
fn the_top_is_checked() {
    only(
        mistakes("[\"eth0\"]", "[]"),
        "1:14: no interface; write the one that clients' packets come in by, such as interfaces = [\"eth0\"]",
    );
    only(mistakes("\"eth0\"", "\"eth0\", \"eth0\""), "1:23: interface `eth0` is listed twice; write it once");
    only(mistakes("eth0", "a/b"), "1:15: `a/b` is no interface name; `ip link` lists what there is");
    only(
        mistakes("eth0", "a234567890123456"),
        "1:15: `a234567890123456` is no interface name; `ip link` lists what there is",
    );
    only(
        mistakes("0.0.0.0:3262", "eth0:3262"),
        "2:11: `eth0:3262` is no address to listen on; write ADDRESS:PORT, such as 0.0.0.0:3262 or [::]:3262",
    );
    only(
        mistakes("0.0.0.0:3262", "[::ffff:10.0.0.1]:3262"),
        "2:11: `[::ffff:10.0.0.1]:3262` is an IPv4 address in the form of IPv6; write it as 10.0.0.1",
    );
    only(
        mistakes("\"0.0.0.0:3262\"", "\"0.0.0.0\", \"10.0.0.1\""),
        "2:22: 10.0.0.1:3262 is already listened on by 0.0.0.0:3262; write only one of them",
    );
    let top = |line: &str| mistakes("\n\n[[farm]]", &format!("\n{line}\n[[farm]]"));
    only(
        top("mode = \"nativ\""),
        "3:8: `nativ` is no mode; write \"native\", \"generic\" or \"auto\" (did you mean native?)",
    );
    only(top("keepalive = 0"), "3:13: `keepalive` is 0 s; write a number of seconds from 0.05 to 3600 (default 5)");
    only(top("keepalive = nan"), "3:13: `keepalive` is NaN s; write a number of seconds from 0.05 to 3600 (default 5)");
    only(top("grace = -1"), "3:9: `grace` is -1 s; write a number of seconds from 0 to 86400 (default 60)");
    only(top("pin = \"necp\""), "3:7: `pin` must be an absolute path, such as /sys/fs/bpf/necp");
    let long = top(&format!("socket = \"/{}\"", "x".repeat(110)));
    only(long, "3:10: the path of a Unix socket has at most 107 bytes; write a shorter one, such as /run/necp/ne.sock");
    let bare = NeConfig::parse("interfaces = [\"eth0\"]").expect_err("no farm");
    assert!(bare[0].message.starts_with("there is no farm; write a section [[farm]]"), "{bare:?}");
}

#[test]
fn a_farm_is_checked() {
    only(mistakes("\"web\"", "\"a b\""), "5:8: `a b` is no farm name; write 1 to 32 letters, digits, `-`, `_` or `.`");
    only(
        mistakes("192.0.2.10", "192.0.2.10/32"),
        "6:9: `192.0.2.10/32` is no address; write a virtual address such as 192.0.2.10 or 2001:db8::10, without a prefix length",
    );
    for no_vip in ["fe80::1", "::1", "ff02::1", "::"] {
        let expected = format!("6:9: `{no_vip}` cannot be a virtual address; write an address that clients connect to");
        only(mistakes("192.0.2.10", no_vip), &expected);
    }
    only(
        mistakes("192.0.2.10", "127.0.0.1"),
        "6:9: `127.0.0.1` cannot be a virtual address; write an address that clients connect to",
    );
    only(
        mistakes("\"192.0.2.10\"", "\"192.0.2.10\", \"192.0.2.10\""),
        "6:23: VIP 192.0.2.10 is listed twice; write it once",
    );
    only(
        mistakes("[\"192.0.2.10\"]", "[]"),
        "6:8: `vips` is empty; write the address that clients connect to, such as vips = [\"192.0.2.10\"]",
    );
    assert!(mistakes("tcp/80", "tpc/80")[0].starts_with("7:13: `tpc/80` is no service; write tcp/PORT or udp/PORT"));
    only(
        mistakes("tcp/80", "1"),
        "7:13: protocol 1: ICMP is no service: errors go where the flows are that they are about",
    );
    assert!(mistakes("tcp/80", "58")[0].starts_with("7:13: protocol 58: ICMP is no service"));
    only(
        mistakes("tcp/80", "136"),
        "7:13: protocol 136: its checksum covers the addresses, and l3 does not mend it: leave l3 out, or this service",
    );
    only(mistakes("\"l2\"", "\"l4\""), "8:15: `l4` is no forwarding type; write l2, gre or l3");
    let untracked = with("udp_tracking = false");
    only(untracked, "8:14: l3 needs flows on record, so that replies find theirs: drop udp_tracking = false, or l3");
    only(
        mistakes("10.0.0.0/24", "10.0.0.1/24"),
        "9:12: `10.0.0.1/24` has host bits set; write 10.0.0.0/24 (or 10.0.0.1/32 for that one server)",
    );
    only(
        mistakes("10.0.0.0/24", "web1"),
        "9:12: `web1` is no prefix; write who may join as 10.0.0.0/24, 10.0.0.11 or 2001:db8::/64",
    );
    only(
        mistakes("udp/443", "tcp/3262"),
        "7:12: tcp/3262 on 192.0.2.10 is where this NE itself listens for servers; take it out of `services`, or listen on another port",
    );
}

#[test]
fn a_farms_options_are_checked() {
    only(
        with("table_size = 65536"),
        "11:14: `table_size` must be a prime, and 65536 is none; write 65537 (default 65537)",
    );
    only(with("table_size = 2"), "11:14: `table_size` is 2; write a prime from 3 to 1048573 (default 65537)");
    only(with("udp_idle = 0"), "11:12: `udp_idle` is 0 s; write a number of seconds from 1 to 8640000 (default 180)");
    assert!(with("hash_seed = -1")[0].starts_with("11:13: `hash_seed` must not be negative; write"));
    only(
        with("capacity = { \"10.0.1.1\" = 2 }"),
        "11:14: 10.0.1.1 has a capacity but may not join; add it to `servers`, or take it away here",
    );
    only(
        with("capacity = { \"10.0.0.1\" = 0 }"),
        "11:27: the capacity of 10.0.0.1 is 0; write a number from 0.01 to 1000 (1 = an ordinary server)",
    );
    assert!(with("capacity = { web = 1 }")[0].starts_with("11:14: `web` is no address"));
}

#[test]
fn authentication_is_never_silently_absent() {
    const CHOICES: &str = "write key_file = \"/etc/necp/web.key\", keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" } or \
                           both, or auth = \"none\" and admit only prefixes that you trust in `servers`";
    only(mistakes("auth = \"none\"", "auth = \"hmac\""), &format!("10:8: auth = \"hmac\" is not known; {CHOICES}"));
    let both = "10:8: farm `web` has keys, and auth = \"none\" says that it needs none; write one of the two";
    only(with("key_file = \"/etc/necp/web.key\""), both);
    only(with("keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }"), both);
    only(
        mistakes("auth = \"none\"", ""),
        &format!("5:8: farm `web` does not say how its servers prove who they are; {CHOICES}"),
    );
}

fn keyed(keys: &str) -> NeConfig {
    NeConfig::parse(&GOOD.replace("auth = \"none\"", keys)).expect("no mistake in it")
}

#[test]
fn keys_are_for_a_farm_or_for_its_servers() {
    let (named, other) = (IpAddr::from([10, 0, 0, 11]), IpAddr::from([10, 0, 0, 12]));
    let (web, own) = (Path::new("/etc/necp/web.key"), Path::new("/etc/necp/11.key"));
    let common = keyed("key_file = \"/etc/necp/web.key\"");
    assert_eq!(common.proof(named), Some(Proof::Key(Some(web))));
    assert_eq!(common.proof([10, 9, 9, 9].into()), None, "it may not join");
    assert!(common.farms[0].to_string().ends_with(", key /etc/necp/web.key"), "{}", common.farms[0]);
    let both = keyed("key_file = \"/etc/necp/web.key\"\nkeys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }");
    assert_eq!((both.proof(named), both.proof(other)), (Some(Proof::Key(Some(own))), Some(Proof::Key(Some(web)))));
    assert_eq!(both.key_files(), BTreeSet::from([own, web]));
    assert!(both.farms[0].to_string().ends_with("key /etc/necp/web.key, 1 server with its own"), "{}", both.farms[0]);
    let single = keyed("keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }");
    assert_eq!((single.proof(named), single.proof(other)), (Some(Proof::Key(Some(own))), Some(Proof::Key(None))));
    let notes: Vec<String> = single.notes.iter().map(Mistake::to_string).collect();
    assert_eq!(notes[0], "10:8: servers of farm `web` that are not in `keys` cannot join: there is no `key_file`");
}

#[test]
fn keys_are_checked() {
    let instead = |keys: &str| mistakes("auth = \"none\"", keys);
    only(
        instead("key_file = \"web.key\""),
        "10:12: the path of a key file must be absolute, such as /etc/necp/web.key",
    );
    only(
        instead("keys = { web = \"/etc/necp/11.key\" }"),
        "10:10: `web` is no address; write keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }",
    );
    only(
        instead("keys = { \"10.0.1.11\" = \"/etc/necp/11.key\" }"),
        "10:10: 10.0.1.11 has a key but may not join; add it to `servers`, or take it away here",
    );
    only(instead("keys = {}"), "10:8: `keys` is empty; write keys = { \"10.0.0.11\" = \"/etc/necp/11.key\" }");
}

/// INIT names no farm, so two farms may share a server only if it proves itself to both in the same way.
#[test]
fn an_address_has_one_proof() {
    let two = |first: &str, second: &str, servers: &str| {
        let more = format!(
            "{}[[farm]]\nname = \"b\"\nvips = [\"192.0.2.11\"]\nservices = [\"tcp/22\"]\nforwarding = [\"l2\"]\n\
             servers = [\"{servers}\"]\n{second}\n",
            GOOD.replace("auth = \"none\"", first)
        );
        let mistakes = NeConfig::parse(&more).err().unwrap_or_default();
        mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>()
    };
    let (none, web, other) = ("auth = \"none\"", "key_file = \"/a\"", "key_file = \"/b\"");
    let named = "keys = { \"10.0.0.11\" = \"/a\" }";
    let disputed = |address: &str| {
        [format!(
            "16:11: farms `web` and `b` would both admit {address} and want different proof of it, and INIT names no farm; \
             give both the same key file for it, or disjoint `servers`"
        )]
    };
    for same in [none, web, named] {
        assert_eq!(two(same, same, "10.0.0.0/24"), [""; 0], "{same}");
    }
    assert_eq!(two(none, web, "10.0.1.0/24"), [""; 0], "disjoint");
    assert_eq!(two(none, web, "10.0.0.128/25"), disputed("10.0.0.128"));
    assert_eq!(two(web, other, "10.0.0.0/16"), disputed("10.0.0.0"));
    assert_eq!(two(named, web, "10.0.0.11/32"), [""; 0], "the same file for the one that they share");
    assert_eq!(two(named, other, "10.0.0.11/32"), disputed("10.0.0.11"));
    assert_eq!(two(named, web, "10.0.0.10/31"), disputed("10.0.0.10"), "one of the two has no key in farm web");
}

#[test]
fn two_farms_may_not_claim_the_same() {
    let two = |vip: &str, services: &str, servers: &str| {
        let more = format!(
            "{GOOD}[[farm]]\nname = \"b\"\nvips = [\"{vip}\"]\nservices = [\"{services}\"]\nforwarding = [\"l2\"]\n\
             servers = [\"{servers}\"]\nauth = \"none\"\n"
        );
        NeConfig::parse(&more).map_err(|mistakes| mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>())
    };
    only(
        two("192.0.2.11", "tcp/443", "10.0.0.128/25").expect_err("overlap"),
        "16:12: farms `web` and `b` would both admit 10.0.0.128/25 for tcp/443, and START names no farm; give them disjoint `servers` or different `services`",
    );
    only(
        two("192.0.2.10", "tcp/80", "10.0.1.0/24").expect_err("one VIP twice"),
        "13:9: tcp/80 on VIP 192.0.2.10 belongs to farm `web` already; give `b` another VIP or other services",
    );
    assert!(two("192.0.2.10", "tcp/81", "10.0.0.0/24").is_ok(), "other services may share both");
    only(
        mistakes(
            "auth = \"none\"\n",
            "auth = \"none\"\n[[farm]]\nname = \"web\"\nvips = [\"192.0.2.11\"]\nservices = [\"tcp/22\"]\nforwarding = [\"l2\"]\nservers = [\"10.0.1.0/24\"]\nauth = \"none\"\n",
        ),
        "12:8: two farms are named `web`; give each its own name",
    );
}

#[test]
fn all_mistakes_are_shown_at_once() {
    let text = GOOD.replace("\"none\"", "\"hmac\"").replace("[\"eth0\"]", "[]");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ne.toml");
    std::fs::write(&path, text).expect("written");
    let error = NeConfig::read(&path).expect_err("two mistakes").to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].starts_with(&format!("{}:1:14: ", path.display())), "{error}");
    assert!(lines[1].starts_with(&format!("{}:10:8: ", path.display())), "{error}");
}

#[test]
fn ttl_security_and_tcp_md5() {
    let good = |extra: &str, farm: &str| {
        NeConfig::parse(&format!(
            "interfaces = [\"eth0\"]\n{extra}[[farm]]\nname = \"web\"\nvips = [\"192.0.2.10\"]\nservices = [\"tcp/80\"]\n\
             forwarding = [\"l2\"]\nservers = [\"10.0.0.0/24\", \"10.1.0.7\"]\nauth = \"none\"\n{farm}"
        ))
    };
    let hops = |extra: &str| good(extra, "").expect(extra).ttl_security.map(std::num::NonZeroU8::get);
    assert_eq!(hops(""), None);
    assert_eq!(hops("ttl_security = false\n"), None);
    assert_eq!(hops("ttl_security = true\n"), Some(1));
    assert_eq!(hops("ttl_security = 3\n"), Some(3));
    let md5 = |farm: &str| good("", farm).expect(farm).farms[0].tcp_md5.clone();
    let entry = |net: &str, path: &str| (net.parse::<IpNet>().expect(net), std::path::PathBuf::from(path));
    assert_eq!(md5("tcp_md5 = \"/k\"\n"), [entry("10.0.0.0/24", "/k"), entry("10.1.0.7/32", "/k")]);
    assert_eq!(md5("tcp_md5 = { \"10.0.0.11\" = \"/a\" }\n"), [entry("10.0.0.11/32", "/a")]);

    let wrong = |extra: &str, farm: &str| {
        let mistakes = good(extra, farm).expect_err("wrong");
        mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    for (extra, farm, says) in [
        ("ttl_security = 255\n", "", "`ttl_security` is 255"),
        ("ttl_security = 0\n", "", "`ttl_security` is 0"),
        ("ttl_security = \"yes\"\n", "", "write true"),
        ("", "tcp_md5 = \"k\"\n", "absolute"),
        ("", "tcp_md5 = { \"10.9.0.1\" = \"/k\" }\n", "10.9.0.1/32 has a `tcp_md5` key but may not join"),
        ("", "tcp_md5 = { \"x\" = \"/k\" }\n", "no prefix"),
        ("", "tcp_md5 = 7\n", "write a path"),
    ] {
        let found = wrong(extra, farm);
        assert!(found.contains(says), "{extra}{farm}: {found}");
    }
}

const BOTH: &str = r#"interfaces = ["eth0"]

[[farm]]
name = "web"
vips = ["192.0.2.10", "2001:db8:f::10"]
services = ["tcp/80"]
forwarding = ["l2"]
servers = ["10.0.0.0/24", "2001:db8:a::/64"]
keys = { "2001:db8:a::11" = "/etc/necp/11.key" }
key_file = "/etc/necp/web.key"
capacity = { "2001:db8:a::11" = 2 }
tcp_md5 = { "2001:db8:a::/65" = "/etc/necp/md5" }
"#;

/// The mistakes in BOTH after a replacement, which must hit.
fn mistakes_of_both(from: &str, to: &str) -> Vec<String> {
    assert!(BOTH.contains(from), "{from:?} is not in the text");
    let changed = BOTH.replacen(from, to, 1);
    NeConfig::parse(&changed).expect_err(&changed).iter().map(Mistake::to_string).collect()
}

#[test]
fn a_farm_may_have_both_families() {
    let config = NeConfig::parse(BOTH).expect("no mistake in it");
    assert!(config.notes.is_empty(), "{:?}", config.notes);
    assert_eq!(
        config.farms[0].to_string(),
        "web: tcp/80 on 192.0.2.10 2001:db8:f::10 by l2, servers 10.0.0.0/24 2001:db8:a::/64, 65537 slots per service, \
         key /etc/necp/web.key, 1 server with its own"
    );
    let six: IpAddr = "2001:db8:a::11".parse().expect("an address");
    assert_eq!((config.admits(six), config.slots()), (Some(0), 2 * 65_537));
    assert_eq!(config.proof(six), Some(Proof::Key(Some(Path::new("/etc/necp/11.key")))));
    assert_eq!(config.farms[0].capacity.get(&six), Some(&2.0));
    assert_eq!(config.admits("2001:db8:b::11".parse().expect("an address")), None);
    let without = |text: &str| {
        let config = NeConfig::parse(&BOTH.replacen(text, "", 1)).expect("legal");
        config.notes.iter().map(Mistake::to_string).collect::<Vec<_>>()
    };
    only(
        without(", \"2001:db8:f::10\""),
        "8:11: servers in 2001:db8:a::/64 have nothing to serve: farm `web` has no IPv6 VIP",
    );
    only(
        without("\"10.0.0.0/24\", "),
        "8:11: the IPv4 VIPs of farm `web` have no server: no prefix in `servers` is IPv4",
    );
}

#[test]
fn ipv6_addresses_are_checked() {
    only(
        mistakes_of_both("\"2001:db8:a::/64\"", "\"2001:db8:a::/64\", \"fe80::/64\""),
        "8:46: `fe80::/64` is link-local, and such an address says nothing without its link; write who may join by global \
         or unique local addresses, such as 2001:db8::/64",
    );
    only(
        mistakes_of_both("\"2001:db8:a::/64\"", "\"2001:db8:a::/64\", \"::ffff:10.1.0.0/112\""),
        "8:46: `::ffff:10.1.0.0/112` is an IPv4 address in the form of IPv6; write it as 10.1.0.0",
    );
    only(
        mistakes_of_both("\"2001:db8:a::/64\"", "\"2001:db8:a::/64\", \"2001:db8:b::1/64\""),
        "8:46: `2001:db8:b::1/64` has host bits set; write 2001:db8:b::/64 (or 2001:db8:b::1/128 for that one server)",
    );
    only(
        mistakes_of_both("keys = { \"2001:db8:a::11\"", "keys = { \"2001:db8:b::11\""),
        "9:10: 2001:db8:b::11 has a key but may not join; add it to `servers`, or take it away here",
    );
    let listens = |listen: &str| mistakes_of_both("\n\n[[farm]]", &format!("\nlisten = {listen}\n[[farm]]"));
    only(
        listens("[\"[::]:3262\", \"2001:db8:f::1\"]"),
        "2:24: [2001:db8:f::1]:3262 is already listened on by [::]:3262; write only one of them",
    );
    let own = mistakes_of_both("tcp/80", "tcp/3262");
    assert_eq!(own.len(), 2, "by default it listens on both: {own:?}");
    assert!(
        own[1].starts_with("6:12: tcp/3262 on 2001:db8:f::10 is where this NE itself listens for servers"),
        "{own:?}"
    );
}
