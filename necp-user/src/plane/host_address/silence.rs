//! An address on `lo` is unknown to the link, without any setting.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::*;
use crate::plane::throwaway_netns::in_new_netns;

const VIP: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);

/// Whoever solicits a neighbour for it on a link hears nothing, whatever the settings; for an address of the link itself
/// there is an answer.
#[test]
fn the_link_does_not_learn_of_it() {
    in_new_netns(async || {
        let (connection, handle, _) = rtnetlink::new_connection().expect("a netlink socket");
        tokio::spawn(connection);
        handle.link().add(rtnetlink::LinkVeth::new("na", "nb").build()).execute().await.expect("a veth pair");
        for name in ["lo", "na", "nb"] {
            let up = rtnetlink::LinkUnspec::new_with_name(name).up().build();
            handle.link().set(up).execute().await.expect("the link comes up");
        }
        let own = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
        let (addresses, driver) = HostAddresses::open("necp-t").expect("a netlink socket");
        tokio::spawn(driver);
        addresses.add("nb", IpAddr::V6(own).into(), Scope::Global).await.expect("added");
        addresses.add("lo", IpAddr::V6(VIP).into(), Scope::Host).await.expect("added");
        for setting in ["forwarding", "proxy_ndp"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/all/{setting}"), "1").expect("a setting");
        }
        // A link that has just come up may drop what is sent in its first moments.
        assert!(wait_for_answer(own, 100), "the link works");
        assert!(!wait_for_answer(VIP, 10), "nobody may learn of the VIP");
    });
}

/// Whether one of so many solicitations for an address, sent from `na`, is answered within 100 ms.
fn wait_for_answer(target: Ipv6Addr, tries: usize) -> bool {
    let all = socket2::Protocol::from(i32::from((libc::ETH_P_IPV6 as u16).to_be()));
    let heard = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(all)).expect("a socket");
    heard.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    // SAFETY: `sockaddr_ll` is one of the `sockaddr_*` types that fit into the storage, and the length is its own.
    let (_, to) = unsafe {
        socket2::SockAddr::try_init(|storage, length| {
            let to = &mut *storage.cast::<libc::sockaddr_ll>();
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_protocol = (libc::ETH_P_IPV6 as u16).to_be();
            to.sll_ifindex = interface_index("na").expect("na") as i32;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
        .expect("an address")
    };
    heard.bind(&to).expect("bound to na");
    let advertisement = [&[136][..], &target.octets()].concat();
    let mut buffer = [0; 256];
    for _ in 0..tries {
        heard.send_to(&solicitation(target), &to).expect("sent");
        while let Ok(length) = std::io::Read::read(&mut &heard, &mut buffer) {
            let frame = &buffer[..length];
            if length >= 78 && frame[20] == 58 && frame[54] == advertisement[0] && frame[62..78] == advertisement[1..] {
                return true;
            }
        }
    }
    false
}

/// A neighbour solicitation (RFC 4861 §4.3) from fe80::7 to all nodes.
fn solicitation(target: Ipv6Addr) -> Vec<u8> {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
    let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7).octets();
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
    let mut icmp = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &MAC].concat();
    let pseudo = [&source[..], &to, &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
    let words = [&pseudo[..], &icmp].concat();
    let sum: u32 = words.as_chunks().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    icmp[2..4].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    let header = [&[0x60, 0, 0, 0, 0, icmp.len() as u8, 58, 255][..], &source, &to].concat();
    [&[0x33, 0x33, 0, 0, 0, 1][..], &MAC, &[0x86, 0xdd], &header, &icmp].concat()
}
