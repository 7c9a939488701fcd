//! What PostgreSQL keeps of a password (`pg_authid.rolpassword`), and the keys of SCRAM that follow from it.
//!
//! Keys are wiped when dropped and never shown.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroize as _;

pub const KEY_LENGTH: usize = 32;
/// As PostgreSQL makes them (SCRAM_DEFAULT_SALT_LEN, SCRAM_SHA_256_DEFAULT_ITERATIONS).
const SALT_LENGTH: usize = 16;
pub const DEFAULT_ITERATIONS: u32 = 4096;

/// A key of SCRAM-SHA-256.
#[derive(Clone)]
pub struct Key([u8; KEY_LENGTH]);

impl Key {
    pub fn new(bytes: [u8; KEY_LENGTH]) -> Key {
        Key(bytes)
    }

    pub fn bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    /// HMAC-SHA-256 of `parts`, one after another, under this key.
    pub fn sign(&self, parts: &[&[u8]]) -> Key {
        sign(&self.0, parts)
    }

    /// H(key): StoredKey of a ClientKey.
    pub fn hash(&self) -> Key {
        Key(Sha256::digest(self.0).into())
    }

    /// Proof ↔ key: XOR with a signature is its own inverse.
    pub fn xor(&self, other: &Key) -> Key {
        let mut bytes = self.0;
        for (byte, with) in bytes.iter_mut().zip(other.0) {
            *byte ^= with;
        }
        Key(bytes)
    }

    /// In a time that does not depend on where they differ.
    pub fn equals(&self, other: &Key) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(key)")
    }
}

/// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`: proves a password without knowing it.
#[derive(Clone, Debug)]
pub struct Verifier {
    pub iterations: u32,
    pub salt: Vec<u8>,
    pub stored_key: Key,
    pub server_key: Key,
}

/// The stored password as far as it concerns whoever asks for a login.
#[derive(Clone, Debug)]
pub enum StoredPassword {
    Scram(Verifier),
    /// The role has none.
    None,
    Md5,
    /// Neither SCRAM nor MD5: a newer PostgreSQL, or damage.
    Unreadable,
}

impl StoredPassword {
    pub fn read(stored: Option<&str>) -> StoredPassword {
        let Some(stored) = stored.filter(|text| !text.is_empty()) else { return StoredPassword::None };
        match stored.parse() {
            Ok(verifier) => StoredPassword::Scram(verifier),
            // As get_password_type(): `md5` and 32 hexadecimal digits.
            Err(NotScram) if stored.strip_prefix("md5").is_some_and(is_md5) => StoredPassword::Md5,
            Err(NotScram) => StoredPassword::Unreadable,
        }
    }
}

fn is_md5(rest: &str) -> bool {
    rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a SCRAM-SHA-256 verifier")]
pub struct NotScram;

impl FromStr for Verifier {
    type Err = NotScram;

    fn from_str(text: &str) -> Result<Verifier, NotScram> {
        let rest = text.strip_prefix("SCRAM-SHA-256$").ok_or(NotScram)?;
        let (iterations, rest) = rest.split_once(':').ok_or(NotScram)?;
        let (salt, keys) = rest.split_once('$').ok_or(NotScram)?;
        let (stored_key, server_key) = keys.split_once(':').ok_or(NotScram)?;
        let iterations = iterations.parse().ok().filter(|n| (1..=i32::MAX as u32).contains(n)).ok_or(NotScram)?;
        let salt = BASE64.decode(salt).ok().filter(|salt| !salt.is_empty()).ok_or(NotScram)?;
        Ok(Verifier { iterations, salt, stored_key: key(stored_key)?, server_key: key(server_key)? })
    }
}

impl Verifier {
    /// For a user who is not there, or may not come in: the same name always gets the same salt, so nobody learns from
    /// the exchange whether the role exists. It proves nothing: whoever uses it refuses at the end.
    pub fn mock(secret: &MockSecret, user: &str, iterations: u32) -> Verifier {
        let part = |purpose: &[u8]| secret.0.sign(&[purpose, user.as_bytes()]);
        let salt = part(b"salt:").bytes()[..SALT_LENGTH].to_vec();
        Verifier { iterations, salt, stored_key: part(b"stored:"), server_key: part(b"server:") }
    }
}

/// Where the salts of mock exchanges come from. The same on all members, else two of them would answer differently for a
/// name that is not there.
#[derive(Clone, Debug)]
pub struct MockSecret(Key);

impl MockSecret {
    /// From a secret that all members share already.
    pub fn derive(shared: &[u8]) -> MockSecret {
        MockSecret(sign(shared, &[b"pgvigil: salts of roles that are not there"]))
    }

    pub fn from_key(key: Key) -> MockSecret {
        MockSecret(key)
    }

    pub fn key(&self) -> &Key {
        &self.0
    }
}

fn sign(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    for part in parts {
        mac.update(part);
    }
    Key(mac.finalize().into_bytes().into())
}

fn key(text: &str) -> Result<Key, NotScram> {
    let bytes = BASE64.decode(text).map_err(|_| NotScram)?;
    Ok(Key(bytes.try_into().map_err(|_| NotScram)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The password of RFC 7677 §3 as PostgreSQL would store it: salt W22ZaJ0SNY7soEsUEjb6gQ==, 4096 iterations.
    const PENCIL: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                          wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    #[test]
    fn a_verifier_is_read() {
        let verifier: Verifier = PENCIL.parse().unwrap();
        assert_eq!((verifier.iterations, verifier.salt.len()), (4096, 16));
        assert!(matches!(StoredPassword::read(Some(PENCIL)), StoredPassword::Scram(_)));
    }

    #[test]
    fn what_is_no_verifier_is_named() {
        let md5 = "md53175bce1d3201d16594cebf9d7eb3f9d";
        assert!(matches!(StoredPassword::read(None), StoredPassword::None));
        assert!(matches!(StoredPassword::read(Some("")), StoredPassword::None));
        assert!(matches!(StoredPassword::read(Some(md5)), StoredPassword::Md5));
        for text in [
            "geheim",
            "md5",
            "md5xyz",
            &PENCIL.replace("4096", "0"),
            &PENCIL.replace("4096", "-1"),
            &PENCIL.replace("4096", "4294967295"),
            &PENCIL.replace("WG5d", "W"),
            &PENCIL.replace("W22ZaJ0SNY7soEsUEjb6gQ==", ""),
            &PENCIL.replace("256$", "512$"),
        ] {
            assert!(matches!(StoredPassword::read(Some(text)), StoredPassword::Unreadable), "{text}");
        }
    }

    #[test]
    fn a_name_that_is_not_there_always_gets_the_same_salt() {
        let secret = MockSecret::derive(b"shared");
        let salt = |secret: &MockSecret, user| Verifier::mock(secret, user, 4096).salt;
        assert_eq!(salt(&secret, "nobody"), salt(&MockSecret::derive(b"shared"), "nobody"));
        assert_ne!(salt(&secret, "nobody"), salt(&secret, "nobody2"));
        assert_ne!(salt(&secret, "nobody"), salt(&MockSecret::derive(b"other"), "nobody"));
        assert_eq!(salt(&secret, "nobody").len(), 16);
    }

    #[test]
    fn keys_are_not_shown() {
        assert_eq!(format!("{:?}", Key::new([7; 32])), "(key)");
    }
}
