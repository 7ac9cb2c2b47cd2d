//! Units against the draft's §5.4 to §5.6, written out by hand.

use super::*;

fn unit(first: [u32; 4]) -> Unit {
    Unit([first[0], first[1], first[2], first[3], 0, 0, 0, 0])
}

/// §5.6.1: forwarding type, protocol, port; and back.
#[test]
fn start_units_that_are_legal() {
    let table = [
        ([1, 6, 80, 0], Forwarding::L2, "tcp/80"),
        ([2, 17, 65_535, 0], Forwarding::Gre, "udp/65535"),
        ([3, 6, 1, 0], Forwarding::L3, "tcp/1"),
        ([1, 47, 0, 0], Forwarding::L2, "47"),
        ([1, 255, 0, 0], Forwarding::L2, "255"),
    ];
    for (words, forwarding, service) in table {
        let expected = ServiceUnit::new(forwarding, service.parse().unwrap());
        assert_eq!(ServiceUnit::parse(&unit(words)), Ok(expected));
        assert_eq!(expected.unit(), unit(words));
        assert_eq!(expected.key().to_string(), service);
    }
}

/// §5.6.1: the port has no meaning unless TCP or UDP, so it is ignored whatever it holds; words beyond data2 too.
#[test]
fn fields_without_meaning_are_ignored() {
    for port in [1, 80, 65_536, u32::MAX] {
        let parsed = ServiceUnit::parse(&Unit([1, 50, port, 1, 2, 3, 4, u32::MAX])).unwrap();
        assert_eq!((parsed.protocol, parsed.port), (50, 0));
    }
}

/// §5.2.3, §5.6.1: fields out of range and bits above a sub-word field.
#[test]
fn start_units_that_fail() {
    let table = [
        ([0, 6, 80, 0], UnitError::Forwarding(0)),
        ([4, 6, 80, 0], UnitError::Forwarding(4)),
        ([0x0100_0001, 6, 80, 0], UnitError::Forwarding(0x0100_0001)),
        ([1, 0, 80, 0], UnitError::Protocol(0)),
        ([1, 256, 80, 0], UnitError::Protocol(256)),
        ([1, 0x0100_0006, 80, 0], UnitError::Protocol(0x0100_0006)),
        ([1, 6, 0, 0], UnitError::Port(0)),
        ([1, 17, 0, 0], UnitError::Port(0)),
        ([1, 6, 65_536, 0], UnitError::Port(65_536)),
        ([1, 17, 0x8000_0050, 0], UnitError::Port(0x8000_0050)),
    ];
    for (words, error) in table {
        assert_eq!(ServiceUnit::parse(&unit(words)), Err(error));
        let stop = Operation::parse_stop(&unit(words));
        // STOP does not read data0 (§5.6.3), and is as strict about the rest.
        assert_eq!(stop.is_ok(), matches!(error, UnitError::Forwarding(_)), "{words:?}");
    }
}

/// §5.6.3: STOP is keyed by protocol and port.
#[test]
fn stop_units() {
    let service: ServiceKey = "tcp/443".parse().unwrap();
    for data0 in [0, 1, 3, 77, u32::MAX] {
        assert_eq!(Operation::parse_stop(&unit([data0, 6, 443, 0])), Ok(Operation::Stop(service)));
    }
    assert_eq!(Operation::stop_unit(service), unit([0, 6, 443, 0]));
}

/// §5.5.1: the Health Index is query type 1.
#[test]
fn queries() {
    let service: ServiceKey = "udp/53".parse().unwrap();
    assert_eq!(Query::parse(&unit([1, 17, 53, 0])), Ok(Query { service }));
    assert_eq!(Query { service }.unit(), unit([1, 17, 53, 0]));
    assert_eq!(Query::parse(&unit([1, 47, 99, 0])), Ok(Query { service: ServiceKey::new(47, 0) }));
    let table = [
        ([0, 6, 80, 0], UnitError::QueryType(0)),
        ([2, 6, 80, 0], UnitError::QueryType(2)),
        ([257, 6, 80, 0], UnitError::QueryType(257)),
        ([1, 256, 80, 0], UnitError::Protocol(256)),
        ([1, 6, 65_536, 0], UnitError::Port(65_536)),
    ];
    for (words, error) in table {
        assert_eq!(Query::parse(&unit(words)), Err(error));
    }
}

/// §5.5.2: 0 to 100; data0 to data2 repeated.
#[test]
fn health_answers() {
    for health in [0, 1, 99, 100] {
        let answer = HealthAnswer::unit(&unit([1, 6, 80, 7]), health);
        assert_eq!(answer, unit([1, 6, 80, health.into()]));
        let expected = HealthAnswer { service: ServiceKey::new(6, 80), health };
        assert_eq!(HealthAnswer::parse(&answer), Ok(expected));
    }
    for health in [101, 255, 256, 356, u32::MAX] {
        assert_eq!(HealthAnswer::parse(&unit([1, 6, 80, health])), Err(UnitError::Health(health)));
    }
}

/// §5.4.1: bit 0x1 of data0, sequence number in data1 and data2; both without meaning if it is not set.
#[test]
fn init_units() {
    let numbered = Init { authenticate: Some(0x0102_0304_0506_0708) };
    assert_eq!(numbered.unit(), unit([1, 0x0102_0304, 0x0506_0708, 0]));
    assert_eq!(Init::parse(&numbered.unit()), Ok(numbered));
    assert_eq!(Init::default().unit(), Unit::default());
    assert_eq!(Init::parse(&unit([0, 5, 6, 0])), Ok(Init { authenticate: None }));
    for flags in [2, 3, 0x8000_0000, u32::MAX] {
        assert_eq!(Init::parse(&unit([flags, 0, 0, 0])), Err(UnitError::InitFlags(flags)));
    }
}

/// §5.4.2: sequence number in data0 and data1.
#[test]
fn init_ack_units() {
    let ack = InitAck { first_seq_num: 0x0102_0304_0506_0708 };
    assert_eq!(ack.unit(), unit([0x0102_0304, 0x0506_0708, 0, 0]));
    assert_eq!(InitAck::parse(&ack.unit()), ack);
    assert_eq!(InitAck::default().unit(), Unit::default());
}
