//! Hashes that are the same in every build and on every NE: tables of several NEs must agree.

use std::net::IpAddr;

/// A 64-bit hash of bytes (FNV-1a, then mixed); no secret, no seed.
pub const fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        at += 1;
    }
    mix(hash)
}

/// A bijection of 64-bit numbers that changes about half of the bits (MurmurHash3's finalizer).
pub const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ h >> 33
}

/// Who a server is to a slot table: its address and the service, nothing that is this NE's own.
pub fn identity(address: IpAddr, protocol: u8, port: u16) -> u64 {
    let [e, f] = port.to_be_bytes();
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            hash_bytes(&[a, b, c, d, protocol, e, f])
        }
        IpAddr::V6(address) => {
            let mut bytes = [0; 19];
            bytes[..16].copy_from_slice(&address.octets());
            bytes[16..].copy_from_slice(&[protocol, e, f]);
            hash_bytes(&bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_never_change() {
        assert_eq!(hash_bytes(b""), 0xefd0_1f60_ba99_2926);
        assert_eq!(hash_bytes(b"web"), hash_bytes("web".as_bytes()));
        assert_ne!(hash_bytes(b"web"), hash_bytes(b"wec"));
        let one = identity([10, 0, 0, 1].into(), 6, 80);
        assert_ne!(one, identity([10, 0, 0, 1].into(), 6, 443));
        assert_ne!(one, identity([10, 0, 0, 2].into(), 6, 80));
        assert_ne!(one, identity([10, 0, 0, 1].into(), 17, 80));
    }
}
