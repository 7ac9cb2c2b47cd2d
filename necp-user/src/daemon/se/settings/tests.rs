use clap::Parser;

use super::*;
use crate::necp::Forwarding;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    Command::try_parse_from(std::iter::once("necp").chain(line.split_whitespace())).expect(line).args
}

fn load(line: &str, file: &str) -> Result<Settings, String> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("se.toml");
    std::fs::write(&path, file).expect("written");
    let mut args = args(line);
    args.config = Some(path.clone());
    Settings::load(args).map_err(|error| error.to_string().replace(&path.display().to_string(), "se.toml"))
}

fn offer(text: &str) -> ServiceUnit {
    text.parse::<Offer>().expect(text).0
}

#[test]
fn the_command_line_alone_with_its_defaults() {
    let settings = Settings::load(args("--ne 10.0.0.1 --serve tcp/80=l2")).expect("enough");
    assert_eq!(settings.nes, [NeAddress { host: "10.0.0.1".into(), port: 3262 }]);
    assert_eq!(settings.offers, [ServiceUnit::new(Forwarding::L2, ServiceKey::new(6, 80))]);
    assert_eq!(settings.health, HealthSource::Constant(HealthIndex::FULL));
    let seconds =
        [settings.health_interval, settings.health_timeout, settings.keepalive, settings.retry_max, settings.drain];
    assert_eq!(seconds.map(|time| time.as_secs()), [1, 2, 5, 256, 30]);
    assert_eq!((settings.source, settings.vips, settings.lock), (None, vec![], PathBuf::from("/run/necp/se.lock")));
    assert_eq!(settings.socket, PathBuf::from("/run/necp/se.sock"));
}

const FILE: &str = "\
ne = ['10.0.0.1', '[2001:db8::1]:4000']
serve = ['tcp/80=l2', 'udp/443=gre']
health = 'load'
health_interval = 0.5
source = '10.0.0.11'
keepalive = 1
retry_max = 8
drain = 0
vips = ['192.0.2.10']
lock = '/run/x.lock'
";

#[test]
fn the_file_says_the_same() {
    let settings = load("", &FILE.replace(", '[2001:db8::1]:4000'", "")).expect("enough");
    assert_eq!(settings.offers, [offer("tcp/80=l2"), offer("udp/443=gre")]);
    assert_eq!((settings.health, settings.health_interval), (HealthSource::Load, Duration::from_millis(500)));
    assert_eq!((settings.source, settings.vips), (Some([10, 0, 0, 11].into()), vec![[192, 0, 2, 10].into()]));
    assert_eq!((settings.keepalive.as_secs(), settings.retry_max.as_secs(), settings.drain), (1, 8, Duration::ZERO));
    assert_eq!((settings.lock, settings.socket), (PathBuf::from("/run/x.lock"), PathBuf::from("/run/x.sock")));
}

#[test]
fn the_command_line_wins() {
    let settings = load("--ne ne.example:99 --health 7 --keepalive 0.2 --drain 3 --source 10.0.0.12 --lock /l", FILE);
    let settings = settings.expect("enough");
    assert_eq!(settings.nes, [NeAddress { host: "ne.example".into(), port: 99 }], "a list is replaced as a whole");
    assert_eq!(settings.health.to_string(), "constant:7");
    assert_eq!((settings.keepalive, settings.drain), (Duration::from_millis(200), Duration::from_secs(3)));
    assert_eq!((settings.source, settings.lock), (Some([10, 0, 0, 12].into()), PathBuf::from("/l")));
    assert_eq!(settings.offers.len(), 2, "what is not given stays");
}

#[test]
fn mistakes_in_the_file_name_their_line() {
    for (file, error) in [
        ("ne = ['10.0.0.1']\nserv = []\n", "se.toml:2:1: unknown key `serv`; did you mean `serve`?"),
        ("retry-max = 3\n", "se.toml:1:1: unknown key `retry-max`; did you mean `retry_max`?"),
        ("vip = []\n", "se.toml:1:1: unknown key `vip`; did you mean `vips`?"),
        (
            "\nserve = ['tcp/80']\n",
            "se.toml:2:10: `tcp/80` lacks its forwarding type; write tcp/80=l2, tcp/80=gre or tcp/80=l3",
        ),
        ("serve = ['tcp/80=l4']\n", "se.toml:1:10: `l4` is no forwarding type; write l2, gre or l3"),
        ("keepalive = -1\n", "se.toml:1:13: a time is a number of seconds, such as 5 or 0.5"),
        ("keepalive = nan\n", "se.toml:1:13: a time is a number of seconds, such as 5 or 0.5"),
    ] {
        assert_eq!(load("", file).expect_err(file), error);
    }
    assert!(load("", "health = 'x'\n").expect_err("no source").starts_with("se.toml:1:10: `x` is no health source"));
}

#[test]
fn what_makes_no_sense_together_is_refused() {
    for (line, error) in [
        ("", "no network element to join"),
        ("--ne 10.0.0.1 --ne 10.0.0.1:3262", "10.0.0.1:3262 is named twice"),
        ("--ne 10.0.0.1 --serve tcp/80=l2 --serve tcp/80=gre", "tcp/80 is offered twice"),
        ("--ne 10.0.0.1 --keepalive 0", "--keepalive must be from 0.01 to 3600 seconds"),
        ("--ne 10.0.0.1 --retry-max 0.5", "--retry-max must be from 1 to"),
        ("--ne 10.0.0.1 --drain 1e300", "--drain must be from 0 to"),
        ("--ne 10.0.0.1 --source ::1", "one is IPv4, the other IPv6"),
        ("--ne 10.0.0.1 --vip 127.0.0.2", "127.0.0.2 cannot be a virtual address"),
        ("--ne 10.0.0.1 --vip 255.255.255.255", "cannot be a virtual address"),
        ("--ne [2001:db8::1] --vip fe80::1", "fe80::1 cannot be a virtual address"),
        ("--ne [2001:db8::1] --vip ::1", "::1 cannot be a virtual address"),
        ("--ne [2001:db8::1] --vip ff02::1", "ff02::1 cannot be a virtual address"),
        ("--ne [2001:db8::1] --source 10.0.0.11", "one is IPv4, the other IPv6"),
        ("--ne [fe80::1]", "fe80::1 is link-local"),
        ("--ne [2001:db8::1] --source fe80::2", "fe80::2 is link-local"),
    ] {
        let found = Settings::load(args(line)).expect_err(line).to_string();
        assert!(found.contains(error), "{line}: {found}");
    }
    Settings::load(args("--ne 10.0.0.1")).expect("a session that serves nothing is legal");
    let six =
        "--ne [2001:db8::1]:99 --ne ne.example --source 2001:db8::11 --vip 2001:db8:1::10 --decap-from 2001:db8::2";
    let six = Settings::load(args(six)).expect("IPv6 throughout");
    assert_eq!((six.nes[0].to_string().as_str(), six.vips.len(), six.decap_from.len()), ("[2001:db8::1]:99", 1, 1));
    let mapped = Settings::load(args("--ne [::ffff:10.0.0.1] --source ::ffff:10.0.0.11")).expect("it is IPv4");
    assert_eq!(mapped.source, Some([10, 0, 0, 11].into()));
}

#[test]
fn the_help_has_examples() {
    use clap::CommandFactory as _;
    let help = Command::command().render_help().to_string();
    for word in ["Examples:", "necp se --ne 10.0.0.1 --serve tcp/80=l2", "--drain <SECS>"] {
        assert!(help.contains(word), "{word} is not in\n{help}");
    }
}
