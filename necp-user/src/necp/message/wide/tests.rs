//! Wide units as people write them; bytes are in `necp/vectors/messages.txt`.

use super::*;

fn flows(source: &str, destination: &str, protocol: u8, port: u16) -> Flows {
    Flows { source: source.parse().unwrap(), destination: destination.parse().unwrap(), protocol, port }
}

const A: &str = "2001:db8:7::/48";
const B: &str = "2001:db8::7/128";

/// What is read is normal, and its unit reads the same.
#[test]
fn what_is_written_reads_the_same() {
    let all = [
        flows(A, B, 6, 80),
        flows("::/0", B, 17, 0),
        flows(A, "::/0", 0, 0),
        flows("::/0", "::/0", 6, 1),
        flows("8000::/1", "2001:db8::/127", 47, 0),
    ];
    for flows in all {
        for (scope, ttl) in [(Scope::Local, 0), (Scope::Global, u32::MAX)] {
            let exception = Exception { scope, ttl, flows };
            assert_eq!(Exception::parse_wide(&exception.wide_unit()), Ok(exception));
            let listed = Listed { scope, installer: "2001:db8::11".parse().unwrap(), flows };
            assert_eq!(Listed::parse_wide(&listed.wide_unit()), Ok(listed));
        }
        assert_eq!(Exception::parse_wide_del(&Exception::wide_del_unit(&flows)), Ok(flows));
        assert_eq!(Flows::of_own_wide(&Exception::wide_del_unit(&flows)).to_string(), flows.to_string());
    }
    for flows in [flows("203.0.113.0/24", "0.0.0.0/0", 6, 80), Flows::ALL] {
        let listed = Listed { scope: Scope::Local, installer: "10.0.0.11".parse().unwrap(), flows };
        assert_eq!(Listed::parse_wide(&listed.wide_unit()), Ok(listed));
        let exception = Exception { scope: Scope::Local, ttl: 0, flows };
        assert_eq!(Exception::parse_wide(&exception.wide_unit()), Err(UnitError::Family(4)), "it has a basic unit");
    }
}

/// A wildcard is of the other address's family, and nothing becomes wider than it was meant.
#[test]
fn normal_flows() {
    let any4 = "0.0.0.0/0";
    for (given, wanted) in [
        (flows(A, any4, 6, 80), flows(A, "::/0", 6, 80)),
        (flows(any4, B, 0, 0), flows("::/0", B, 0, 0)),
        (flows("::/0", "198.51.100.7/32", 6, 0), flows(any4, "198.51.100.7/32", 6, 0)),
        (flows("::/0", "::/0", 6, 80), flows(any4, any4, 6, 80)),
        (flows("2001:db8:7::9/48", B, 47, 9), flows(A, B, 47, 0)),
        (flows("203.0.113.9/24", any4, 0, 0), flows("203.0.113.0/24", any4, 0, 0)),
    ] {
        assert_eq!(given.normal(), Ok(wanted), "{given}");
        assert_eq!(wanted.normal(), Ok(wanted));
    }
    for (given, error) in [
        (flows(A, "198.51.100.7/32", 0, 0), UnitError::Families),
        (flows("::ffff:10.0.0.0/104", B, 0, 0), UnitError::Address("::ffff:10.0.0.0".parse().unwrap())),
        (flows("::1/64", B, 0, 0), UnitError::PrefixLength(64)),
        (flows("0.0.0.9/8", any4, 0, 0), UnitError::PrefixLength(8)),
        (flows(A, B, 0, 80), UnitError::Port(80)),
    ] {
        assert_eq!(given.normal(), Err(error), "{given}");
    }
}

#[test]
fn a_filter_asks_for_what_it_names() {
    let six = Listed { scope: Scope::Global, installer: "2001:db8:a::11".parse().unwrap(), flows: flows(A, B, 6, 80) };
    let four = Listed {
        scope: Scope::Local,
        installer: "10.0.0.11".parse().unwrap(),
        flows: flows("203.0.113.0/24", "0.0.0.0/0", 6, 80),
    };
    let host = |text: &str| Some((text.parse().unwrap(), None));
    let net = |text: &str, length| Some((text.parse().unwrap(), Some(length)));
    let any = Filter::default();
    let table = [
        (any, true, true),
        (Filter { family: Some(Family::V6), ..any }, true, false),
        (Filter { family: Some(Family::V4), ..any }, false, true),
        (Filter { installer: Some(six.installer), ..any }, true, false),
        (Filter { installer: Some(four.installer), ..any }, false, true),
        (Filter { source: host("2001:db8:7::"), ..any }, true, false),
        (Filter { source: net("2001:db8:7::", 48), destination: host("2001:db8::7"), ..any }, true, false),
        (Filter { source: net("2001:db8:7::", 49), ..any }, false, false),
        (Filter { source: net("203.0.113.0", 24), ..any }, false, true),
        (Filter { scope: Some(Scope::Global), protocol: Some(6), port: Some(80), ..any }, true, false),
    ];
    for (filter, is_six, is_four) in table {
        assert_eq!(Filter::parse_wide(&filter.wide_unit()), Ok(filter));
        assert_eq!((filter.matches(&six), filter.matches(&four)), (is_six, is_four), "{filter:?}");
        // What a basic unit says, it says.
        if filter.is_basic() {
            let basic = Filter::parse(&filter.unit()).unwrap();
            assert_eq!((basic.matches(&six), basic.matches(&four)), (false, is_four), "{filter:?}");
        } else {
            assert!(!is_four, "{filter:?}");
        }
        assert!(!filter.is_only_basic() || !is_six, "{filter:?}");
    }
}
