//! Cancel keys of our own: they name the member whose gate gave them out, so that any front can pass a cancel on.
//!
//! ```text
//! 3.0   64 bits    0 | node (5) | random (26)   random (32)        58 random bits; the sign bit of the process id stays clear
//! 3.2   32 bytes   node, 31 random bytes
//! ```

use bytes::Bytes;

/// Members are numbered in the order of their names; more than this cannot be told apart.
pub const NODES: u8 = 32;

/// A key for a session of `node`, of as many bytes as the protocol version has.
pub fn make(node: u8, minor: u16) -> Result<Bytes, getrandom::Error> {
    let mut key = vec![0; if minor >= 2 { 32 } else { 8 }];
    getrandom::fill(&mut key)?;
    let node = node % NODES;
    key[0] = if minor >= 2 { node } else { node << 2 | key[0] & 0b11 };
    Ok(key.into())
}

/// Whose key this is; `None`: no key of ours.
pub fn node(key: &[u8]) -> Option<u8> {
    let first = *key.first()?;
    match key.len() {
        8 if first < 0x80 => Some(first >> 2),
        32 if first < NODES => Some(first),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_their_member_and_differ() {
        for minor in [0, 2] {
            let mut seen = std::collections::HashSet::new();
            for at in 0..NODES {
                let key = make(at, minor).unwrap();
                assert_eq!(node(&key), Some(at));
                assert!(minor != 0 || key[0] < 0x80, "process ids are not negative");
                assert!(seen.insert(key));
            }
        }
        for foreign in [&b""[..], b"12345", &[0xff; 8], &[0xff; 32], &[0; 33]] {
            assert_eq!(node(foreign), None);
        }
    }
}
