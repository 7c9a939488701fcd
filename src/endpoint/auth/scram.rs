//! SCRAM-SHA-256 and -PLUS, both sides, without I/O (RFC 5802, 7677; PostgreSQL's auth-scram.c says what it takes).
//!
//! ```text
//! client-first ──► Exchange::challenge ──► Challenged::check ──► Proven { client_key, … }, server-final
//!                                server-first                     │
//! backend's login:  Login::first ──► Login::answer(server-first) ──► Answered::verify(server-final)
//! ```
//!
//! A proof is ClientKey XOR a signature that whoever holds the verifier can compute: the endpoint learns ClientKey, and with
//! it logs in to a backend that holds the same verifier. The password is never known here.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::verifier::{KEY_LENGTH, Key, Verifier};

pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    Scram,
    ScramPlus,
}

impl Mechanism {
    pub fn read(name: &[u8]) -> Option<Mechanism> {
        match name {
            b"SCRAM-SHA-256" => Some(Mechanism::Scram),
            b"SCRAM-SHA-256-PLUS" => Some(Mechanism::ScramPlus),
            _ => None,
        }
    }
}

/// Why an exchange ended, in PostgreSQL's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    #[error("invalid SCRAM response: nonce does not match")]
    Nonce,
    #[error("SCRAM channel binding negotiation error")]
    Downgrade,
    #[error("SCRAM channel binding check failed")]
    Binding,
    #[error("unsupported SCRAM channel-binding type \"{0}\"")]
    BindingType(String),
    #[error("{0}")]
    Unsupported(&'static str),
    /// Wrong password, no such role, or one that may not come in: who is at the other end is not told which.
    #[error("password authentication failed")]
    Denied,
}

impl ScramError {
    pub fn sqlstate(&self) -> &'static str {
        match self {
            ScramError::Malformed(_) | ScramError::Nonce | ScramError::BindingType(_) => "08P01",
            ScramError::Unsupported(_) => "0A000",
            ScramError::Downgrade | ScramError::Binding => "28000",
            ScramError::Denied => "28P01",
        }
    }

    pub fn detail(&self) -> Option<&'static str> {
        match self {
            ScramError::Downgrade => Some(
                "The client supports SCRAM channel binding but thinks the server does not.  However, this server does \
                 support channel binding.",
            ),
            _ => None,
        }
    }
}

/// What is offered to a client: `-PLUS` only where there is a certificate to bind to.
pub fn mechanisms(end_point: Option<&[u8]>) -> &'static [&'static str] {
    match end_point {
        Some(_) => &[SCRAM_SHA_256_PLUS, SCRAM_SHA_256],
        None => &[SCRAM_SHA_256],
    }
}

/// The client's channel-binding flag and what it has to repeat in its last message.
enum Flag {
    /// `n`: does not do channel binding.
    No,
    /// `y`: would do it, and saw no offer.
    NotOffered,
    /// `p=tls-server-end-point`.
    EndPoint,
}

/// Before the client's first message.
pub struct Exchange<'a> {
    pub verifier: Verifier,
    /// The verifier is not to be proven by anybody (mock, expired, md5): all runs as usual, and ends in `Denied`.
    pub doomed: bool,
    /// `tls-server-end-point` of the certificate that this client saw; `None` without TLS.
    pub end_point: Option<&'a [u8]>,
    /// Our part of the nonce: printable, without commas, new for each exchange.
    pub nonce: String,
}

/// After our challenge.
pub struct Challenged {
    verifier: Verifier,
    doomed: bool,
    /// base64 of the gs2 header and the binding, as `c=` must be.
    binding: String,
    /// What a wrong `c=` means.
    bound: bool,
    nonce: String,
    /// client-first-message-bare "," server-first-message: what the signatures are over, to be continued.
    so_far: String,
}

/// The client knows the password.
pub struct Proven {
    pub client_key: Key,
    pub verifier: Verifier,
    pub server_final: String,
}

impl Exchange<'_> {
    /// Reads client-first-message; returns server-first-message and what comes next.
    pub fn challenge(self, mechanism: Mechanism, message: &[u8]) -> Result<(String, Challenged), ScramError> {
        let message = text(message)?;
        let (flag, rest) = self.flag(mechanism, message)?;
        // An authorization identity would be another user than that of the startup message.
        let bare = rest.strip_prefix(',').ok_or(if rest.starts_with('a') {
            ScramError::Unsupported("client uses authorization identity, but it is not supported")
        } else {
            ScramError::Malformed("unexpected attribute in client-first-message")
        })?;
        if bare.starts_with("m=") {
            return Err(ScramError::Unsupported("client requires an unsupported SCRAM extension"));
        }
        // The name is the startup message's; what stands here is not looked at (libpq leaves it empty).
        let (_, rest) = attribute(bare, 'n')?;
        let (theirs, extensions) = attribute(rest.ok_or(ScramError::Malformed("no nonce"))?, 'r')?;
        if theirs.is_empty() || !theirs.bytes().all(|b| (0x21..=0x7e).contains(&b)) {
            return Err(ScramError::Malformed("non-printable characters in SCRAM nonce"));
        }
        // Optional extensions are ignored, as long as they are attributes.
        let mut extensions = extensions;
        while let Some(rest) = extensions {
            extensions = any_attribute(rest)?;
        }
        let nonce = format!("{theirs}{}", self.nonce);
        let salt = BASE64.encode(&self.verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", self.verifier.iterations);
        let gs2 = &message[..message.len() - bare.len()];
        let (binding, bound) = match (flag, self.end_point) {
            (Flag::EndPoint, Some(end_point)) => (BASE64.encode([gs2.as_bytes(), end_point].concat()), true),
            (Flag::EndPoint | Flag::No | Flag::NotOffered, _) => (BASE64.encode(gs2), false),
        };
        let so_far = format!("{bare},{server_first}");
        let next = Challenged { verifier: self.verifier, doomed: self.doomed, binding, bound, nonce, so_far };
        Ok((server_first, next))
    }

    /// The rules of RFC 5802 §6 on the flag, the offer and the chosen mechanism.
    fn flag<'m>(&self, mechanism: Mechanism, message: &'m str) -> Result<(Flag, &'m str), ScramError> {
        const PLUS_WITHOUT: ScramError = ScramError::Malformed(
            "the client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data",
        );
        let after = |flag: &str| {
            let rest = message.strip_prefix(flag)?;
            rest.strip_prefix(',')
        };
        const COMMA: ScramError = ScramError::Malformed("comma expected after the channel-binding flag");
        match (message.as_bytes().first(), mechanism) {
            (Some(b'n' | b'y'), Mechanism::ScramPlus) => Err(PLUS_WITHOUT),
            (Some(b'n'), Mechanism::Scram) => Ok((Flag::No, after("n").ok_or(COMMA)?)),
            (Some(b'y'), Mechanism::Scram) => {
                // Somebody between took the offer away.
                if self.end_point.is_some() {
                    return Err(ScramError::Downgrade);
                }
                Ok((Flag::NotOffered, after("y").ok_or(COMMA)?))
            }
            (Some(b'p'), Mechanism::Scram) => Err(ScramError::Malformed(
                "the client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes channel \
                 binding data",
            )),
            (Some(b'p'), Mechanism::ScramPlus) => {
                let (kind, rest) = attribute(message, 'p')?;
                if kind != "tls-server-end-point" {
                    return Err(ScramError::BindingType(
                        kind.chars().filter(char::is_ascii_graphic).take(64).collect(),
                    ));
                }
                Ok((Flag::EndPoint, rest.ok_or(COMMA)?))
            }
            _ => Err(ScramError::Malformed("unexpected channel-binding flag")),
        }
    }
}

impl Challenged {
    /// Reads client-final-message.
    pub fn check(self, message: &[u8]) -> Result<Proven, ScramError> {
        let message = text(message)?;
        let (binding, rest) = attribute(message, 'c')?;
        // Wrong data under `p`: whoever answers does not see our certificate. Else a header that was not said before.
        if binding != self.binding {
            return Err(if self.bound {
                ScramError::Binding
            } else {
                ScramError::Malformed("unexpected SCRAM channel-binding attribute in client-final-message")
            });
        }
        let (nonce, mut rest) = attribute(rest.ok_or(ScramError::Malformed("no nonce"))?, 'r')?;
        let proof = loop {
            let here = rest.ok_or(ScramError::Malformed("no proof in client-final-message"))?;
            if here.starts_with("p=") {
                let (proof, after) = attribute(here, 'p')?;
                if after.is_some() {
                    return Err(ScramError::Malformed("garbage found at the end of client-final-message"));
                }
                break proof;
            }
            rest = any_attribute(here)?;
        };
        if nonce != self.nonce {
            return Err(ScramError::Nonce);
        }
        let without_proof = &message[..message.len() - ",p=".len() - proof.len()];
        let malformed = ScramError::Malformed("malformed proof in client-final-message");
        let proof: [u8; KEY_LENGTH] =
            BASE64.decode(proof).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(malformed)?;

        let auth_message = format!("{},{without_proof}", self.so_far);
        let signature = self.verifier.stored_key.sign(&[auth_message.as_bytes()]);
        let client_key = Key::new(proof).xor(&signature);
        // Both are computed for everybody, so that a role that is not there takes as long as a wrong password.
        let proven = client_key.hash().equals(&self.verifier.stored_key);
        let server_signature = self.verifier.server_key.sign(&[auth_message.as_bytes()]);
        if !proven | self.doomed {
            return Err(ScramError::Denied);
        }
        let server_final = format!("v={}", BASE64.encode(server_signature.bytes()));
        Ok(Proven { client_key, verifier: self.verifier, server_final })
    }
}

// === The other side: to a backend, with keys instead of a password ===

/// What logs in to any server that holds the same verifier.
#[derive(Clone, Debug)]
pub struct Keys {
    pub client_key: Key,
    pub server_key: Key,
    pub salt: Vec<u8>,
    pub iterations: u32,
}

impl Proven {
    pub fn keys(&self) -> Keys {
        let verifier = &self.verifier;
        Keys {
            client_key: self.client_key.clone(),
            server_key: verifier.server_key.clone(),
            salt: verifier.salt.clone(),
            iterations: verifier.iterations,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    #[error("the server's SCRAM message cannot be read: {0}")]
    Malformed(&'static str),
    /// The keys belong to another verifier.
    #[error("the server holds another password for this role than the one that the client proved")]
    OtherVerifier,
    /// It does not know the verifier: not our server.
    #[error("the server could not prove that it knows this role's verifier")]
    NotTheServer,
}

pub struct Login<'a> {
    keys: &'a Keys,
    nonce: String,
}

pub struct Answered {
    server_signature: Key,
}

impl<'a> Login<'a> {
    pub fn new(keys: &'a Keys, nonce: String) -> Login<'a> {
        Login { keys, nonce }
    }

    /// Without channel binding: a backend is reached by a socket of this host, or over TLS with both sides' certificates.
    pub fn first(&self) -> String {
        format!("n,,{}", self.first_bare())
    }

    fn first_bare(&self) -> String {
        format!("n=,r={}", self.nonce)
    }

    /// client-final-message for server-first-message.
    pub fn answer(self, server_first: &[u8]) -> Result<(String, Answered), LoginError> {
        let server_first = std::str::from_utf8(server_first).map_err(|_| LoginError::Malformed("not text"))?;
        let read = |rest: Option<&'_ str>, name| {
            let rest = rest.ok_or(LoginError::Malformed("an attribute is missing"))?;
            attribute(rest, name)
                .map(|(value, rest)| (value.to_owned(), rest.map(str::to_owned)))
                .map_err(|_| LoginError::Malformed("another attribute than expected"))
        };
        let (nonce, rest) = read(Some(server_first), 'r')?;
        let (salt, rest) = read(rest.as_deref(), 's')?;
        let (iterations, _) = read(rest.as_deref(), 'i')?;
        if nonce.len() <= self.nonce.len() || !nonce.starts_with(&self.nonce) {
            return Err(LoginError::Malformed("the nonce is not a continuation of ours"));
        }
        let salt = BASE64.decode(salt).map_err(|_| LoginError::Malformed("the salt is not base64"))?;
        // A proof under another verifier would only look like a wrong password.
        if salt != self.keys.salt || iterations.parse() != Ok(self.keys.iterations) {
            return Err(LoginError::OtherVerifier);
        }
        let without_proof = format!("c=biws,r={nonce}");
        let auth_message = format!("{},{server_first},{without_proof}", self.first_bare());
        let signature = self.keys.client_key.hash().sign(&[auth_message.as_bytes()]);
        let proof = self.keys.client_key.xor(&signature);
        let server_signature = self.keys.server_key.sign(&[auth_message.as_bytes()]);
        Ok((format!("{without_proof},p={}", BASE64.encode(proof.bytes())), Answered { server_signature }))
    }
}

impl Answered {
    pub fn verify(self, server_final: &[u8]) -> Result<(), LoginError> {
        let signature = server_final.strip_prefix(b"v=").ok_or(LoginError::Malformed("no signature"))?;
        let signature = BASE64.decode(signature).ok().and_then(|bytes| bytes.try_into().ok());
        let signature = Key::new(signature.ok_or(LoginError::Malformed("the signature is not one"))?);
        if signature.equals(&self.server_signature) { Ok(()) } else { Err(LoginError::NotTheServer) }
    }
}

/// A new part of a nonce: 18 random bytes, as PostgreSQL takes (SCRAM_RAW_NONCE_LEN).
pub fn nonce() -> Result<String, getrandom::Error> {
    let mut raw = [0; 18];
    getrandom::fill(&mut raw)?;
    Ok(BASE64.encode(raw))
}

// === Attributes ===

fn text(message: &[u8]) -> Result<&str, ScramError> {
    if message.contains(&0) {
        return Err(ScramError::Malformed("message length does not match input length"));
    }
    std::str::from_utf8(message).map_err(|_| ScramError::Malformed("not UTF-8"))
}

/// `x=value` at the beginning: the value, and what comes after its comma.
fn attribute(text: &str, name: char) -> Result<(&str, Option<&str>), ScramError> {
    let value = text.strip_prefix(name).and_then(|rest| rest.strip_prefix('='));
    let value = value.ok_or(ScramError::Malformed("another attribute was expected"))?;
    Ok(match value.split_once(',') {
        Some((value, rest)) => (value, Some(rest)),
        None => (value, None),
    })
}

/// Any attribute: what comes after it.
fn any_attribute(text: &str) -> Result<Option<&str>, ScramError> {
    let name = text.chars().next().filter(char::is_ascii_alphabetic);
    let name = name.ok_or(ScramError::Malformed("attribute expected, but found an invalid character"))?;
    attribute(text, name).map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests;
