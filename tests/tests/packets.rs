//! Frames in, verdicts and frames out, in the kernel.

use necp_ebpf::{
    abi::{ACCEPTS, ALIVE, REACHABLE, Server, Service},
    hash::service_bucket,
    packet::Packet,
    slot::SlotWord,
    verdict::Reason,
};
use necp_tests::kernel::{Kernel, OWN_MAC, Verdict};

#[test]
fn a_plain_slot_sends_to_its_owner() {
    let kernel = Kernel::load(1024, 16).unwrap();
    let view = kernel.view();
    let service = Service {
        address: [192, 0, 2, 10],
        port: 80u16.to_be_bytes(),
        protocol: 6,
        state: 1,
        slots_base: 0,
        slots_size: 5,
        seed: 7,
        id: 1,
        flags: 0,
        farm: 0,
    };
    let key = Packet {
        destination: u32::from_ne_bytes(service.address),
        destination_port: u16::from_ne_bytes(service.port),
        protocol: 6,
        ..Packet::default()
    };
    assert!(view.set_service(service_bucket(key.service_key()), 0, &service));
    let flags = ALIVE | ACCEPTS | REACHABLE;
    assert!(view.set_server(2, &Server { mac: [2, 0, 0, 0, 9, 9], flags, ..Server::default() }));
    for slot in &view.slots()[..5] {
        slot.store(SlotWord::plain(2).0);
    }
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 8, 8], OWN_MAC)
        .ipv4([198, 51, 100, 1], [192, 0, 2, 10], 64)
        .tcp(40000, 80, 1, 1000);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"hello").unwrap();
    let outcome = kernel.run(&frame).unwrap();
    assert_eq!((outcome.verdict, outcome.reason), (Verdict::Tx, Reason::Plain));
    assert_eq!(&outcome.frame[..6], &[2, 0, 0, 0, 9, 9]);
    assert_eq!(&outcome.frame[6..12], &OWN_MAC);
    assert_eq!(&outcome.frame[12..], &frame[12..]);
}
