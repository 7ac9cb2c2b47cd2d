//! The Internet checksum (RFC 1071), computed and mended (RFC 1624).
//!
//! The one's complement sum does not care for byte order, so headers are read as native integers throughout.

/// A sum of 16-bit words, brought back to 16 bits.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// The checksum of something in which `old` became `new` (RFC 1624 §3, equation 3).
#[inline(always)]
pub const fn mend(checksum: u16, old: u32, new: u32) -> u16 {
    !fold(!checksum as u64 + !old as u64 + new as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[u32]) -> u16 {
        !fold(words.iter().map(|&word| u64::from(word)).sum())
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let words = [u32::from_ne_bytes([0x00, 0x01, 0xf2, 0x03]), u32::from_ne_bytes([0xf4, 0xf5, 0xf6, 0xf7])];
        assert_eq!((!of(&words)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn mended_is_computed_anew_and_a_zero_sum_survives() {
        // RFC 1624 §4: the second is where equation 2 fails.
        let values = [0, 1, 0xffff, 0x5555_3285, 0xffff_ffff, 0x8000_7fff, 0x1234_5678, 0xffff_0000];
        for old in values {
            for new in values {
                for rest in [1, 0xdd2f_0000, 0xcd7a, 0xffff_fffe] {
                    assert_eq!(mend(of(&[rest, old]), old, new), of(&[rest, new]), "{rest:x} {old:x} {new:x}");
                }
            }
        }
    }
}
