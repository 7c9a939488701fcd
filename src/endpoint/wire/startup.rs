//! The first packet of a connection, which has no tag: what the client wants, and its parameters word for word.

use bytes::{BufMut, Bytes, BytesMut};

use super::message::Refusal;

/// PostgreSQL's own limit (MAX_STARTUP_PACKET_LENGTH).
pub const LONGEST: usize = 10_000;
/// The newest minor version that is spoken here.
pub const NEWEST_MINOR: u16 = 2;

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
/// Cancel keys: 4 bytes in protocol 3.0, up to 256 in 3.2.
const LONGEST_SECRET: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum First {
    Ssl,
    Gssenc,
    /// Process id and secret together, as they came.
    Cancel(Bytes),
    Startup(Startup),
}

/// A StartupMessage of version 3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Startup {
    /// What the client asked for; may be newer than anything.
    pub minor: u16,
    /// All parameters in their order, those that nobody here knows too.
    pub parameters: Vec<(Bytes, Bytes)>,
}

/// How many bytes the packet has in all, once its length is known.
pub fn packet_length(buffer: &[u8]) -> Result<Option<usize>, Refusal> {
    let Some(length) = buffer.get(..4) else { return Ok(None) };
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if !(8..=LONGEST).contains(&length) {
        return Err(Refusal::violation("invalid length of startup packet"));
    }
    Ok(Some(length))
}

/// Reads a whole packet of `packet_length` bytes.
pub fn parse(packet: &[u8]) -> Result<First, Refusal> {
    let invalid = || Refusal::violation("invalid startup packet layout: expected terminator as last byte");
    let (code, body) = packet.get(4..).and_then(|rest| rest.split_first_chunk::<4>()).ok_or_else(invalid)?;
    match u32::from_be_bytes(*code) {
        SSL_REQUEST if body.is_empty() => Ok(First::Ssl),
        GSSENC_REQUEST if body.is_empty() => Ok(First::Gssenc),
        SSL_REQUEST | GSSENC_REQUEST => Err(Refusal::violation("invalid length of startup packet")),
        // A secret of no bytes has been a way around the check of another proxy.
        CANCEL_REQUEST if (8..=4 + LONGEST_SECRET).contains(&body.len()) => {
            Ok(First::Cancel(Bytes::copy_from_slice(body)))
        }
        CANCEL_REQUEST => Err(Refusal::violation("invalid length of cancel request packet")),
        version if version >> 16 == 3 => {
            let parameters = parameters(body).ok_or_else(invalid)?;
            let startup = Startup { minor: (version & 0xffff) as u16, parameters };
            if startup.user().is_empty() {
                return Err(Refusal::new("28000", "no PostgreSQL user name specified in startup packet"));
            }
            Ok(First::Startup(startup))
        }
        version => Err(Refusal::new(
            "0A000",
            format!(
                "unsupported frontend protocol {}.{}: server supports 3.0 to 3.{NEWEST_MINOR}",
                version >> 16,
                version & 0xffff
            ),
        )),
    }
}

fn parameters(body: &[u8]) -> Option<Vec<(Bytes, Bytes)>> {
    let mut parameters = Vec::new();
    let mut rest = body;
    loop {
        let (name, after) = c_string(rest)?;
        if name.is_empty() {
            // The terminator has to be the last byte.
            return after.is_empty().then_some(parameters);
        }
        let (value, after) = c_string(after)?;
        parameters.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)));
        rest = after;
    }
}

fn c_string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|b| *b == 0)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// What a walsender is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replication {
    None,
    Physical,
    Logical,
}

impl Startup {
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        // As PostgreSQL: the last one counts.
        self.parameters.iter().rev().find(|(n, _)| &n[..] == name.as_bytes()).map(|(_, value)| &value[..])
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(self.get(name).unwrap_or_default()).into_owned()
    }

    pub fn user(&self) -> String {
        self.text("user")
    }

    pub fn database(&self) -> String {
        match self.get("database") {
            Some(database) if !database.is_empty() => String::from_utf8_lossy(database).into_owned(),
            _ => self.user(),
        }
    }

    /// PostgreSQL takes every spelling of a boolean here, and `database`.
    pub fn replication(&self) -> Replication {
        let Some(value) = self.get("replication") else { return Replication::None };
        let value = String::from_utf8_lossy(value).to_ascii_lowercase();
        match value.as_str() {
            "database" => Replication::Logical,
            "0" | "" => Replication::None,
            no if "false".starts_with(no) || "no".starts_with(no) || (no.len() > 1 && "off".starts_with(no)) => {
                Replication::None
            }
            _ => Replication::Physical,
        }
    }

    /// Options of the protocol itself (`_pq_.*`), none of which is known here.
    pub fn protocol_options(&self) -> Vec<Bytes> {
        self.parameters.iter().filter(|(name, _)| name.starts_with(b"_pq_.")).map(|(name, _)| name.clone()).collect()
    }

    /// The minor version to speak with a server: the client's, but none that is not known here.
    pub fn spoken_minor(&self) -> u16 {
        self.minor.min(NEWEST_MINOR)
    }

    /// For a server: what the client sent, without what only this end could answer for.
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u32(0);
        out.put_u32(3 << 16 | u32::from(self.spoken_minor()));
        for (name, value) in self.parameters.iter().filter(|(name, _)| !name.starts_with(b"_pq_.")) {
            out.put_slice(name);
            out.put_u8(0);
            out.put_slice(value);
            out.put_u8(0);
        }
        out.put_u8(0);
        let length = u32::try_from(out.len()).unwrap_or(u32::MAX);
        out[..4].copy_from_slice(&length.to_be_bytes());
        out.freeze()
    }
}

/// A CancelRequest for a server.
pub fn cancel_request(key: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u32(u32::try_from(8 + key.len()).unwrap_or(u32::MAX));
    out.put_u32(CANCEL_REQUEST);
    out.put_slice(key);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut packet = (body.len() as u32 + 8).to_be_bytes().to_vec();
        packet.extend(code.to_be_bytes());
        packet.extend(body);
        packet
    }

    fn startup(minor: u16, body: &[u8]) -> Result<First, Refusal> {
        parse(&packet(3 << 16 | u32::from(minor), body))
    }

    fn good(body: &[u8]) -> Startup {
        match startup(0, body) {
            Ok(First::Startup(startup)) => startup,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parameters_pass_word_for_word() {
        let body =
            b"user\0maas\0database\0maasdb\0application_name\0maas-regiond-x\0search_path\0temporal\0odd\0\xff\xfe\0\0";
        let startup = good(body);
        assert_eq!((startup.user().as_str(), startup.database().as_str()), ("maas", "maasdb"));
        assert_eq!(startup.to_bytes()[..], packet(3 << 16, body));
        assert_eq!(good(b"user\0maas\0database\0\0\0").database(), "maas");
    }

    #[test]
    fn every_prefix_of_a_packet_is_refused_or_waited_for() {
        let whole = packet(3 << 16, b"user\0maas\0database\0maasdb\0\0");
        assert_eq!(packet_length(&whole), Ok(Some(whole.len())));
        for end in 0..4 {
            assert_eq!(packet_length(&whole[..end]), Ok(None));
        }
        for end in 8..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "a packet cut at {end}");
        }
        for length in [0_u32, 7, 10_001, u32::MAX] {
            assert!(packet_length(&length.to_be_bytes()).is_err(), "{length}");
        }
    }

    #[test]
    fn what_is_not_a_startup_message_is_refused_with_its_reason() {
        for (refused, sqlstate) in [
            (startup(0, b"user\0maas\0"), "08P01"),
            (startup(0, b"user\0maas\0\0more"), "08P01"),
            (startup(0, b"user\0\0\0"), "28000"),
            (startup(0, b"\0"), "28000"),
            (parse(&packet(2 << 16, b"\0")), "0A000"),
            (parse(&packet(0x1234_5678, b"")), "0A000"),
            (parse(&packet(SSL_REQUEST, b"more")), "08P01"),
            (parse(&packet(CANCEL_REQUEST, b"1234")), "08P01"),
            (parse(&packet(CANCEL_REQUEST, &[0; 261])), "08P01"),
        ] {
            assert_eq!(refused.unwrap_err().sqlstate, sqlstate);
        }
    }

    #[test]
    fn requests_are_told_apart() {
        assert_eq!(parse(&packet(SSL_REQUEST, b"")), Ok(First::Ssl));
        assert_eq!(parse(&packet(GSSENC_REQUEST, b"")), Ok(First::Gssenc));
        for length in [8, 36, 260] {
            let key = vec![7; length];
            assert_eq!(parse(&cancel_request(&key)), Ok(First::Cancel(key.into())));
        }
    }

    #[test]
    fn unknown_versions_and_options_are_left_to_the_negotiation() {
        let Ok(First::Startup(grease)) = startup(9999, b"user\0maas\0_pq_.test_protocol_negotiation\0x\0\0") else {
            panic!("a newer minor version is no error")
        };
        assert_eq!(grease.protocol_options(), [Bytes::from_static(b"_pq_.test_protocol_negotiation")]);
        assert_eq!(grease.to_bytes()[..], packet(3 << 16 | 2, b"user\0maas\0\0"));
    }

    #[test]
    fn replication_is_recognised_in_every_spelling() {
        let of = |value: &str| good(format!("user\0a\0replication\0{value}\0\0").as_bytes()).replication();
        for yes in ["true", "on", "1", "yes", "t"] {
            assert_eq!(of(yes), Replication::Physical, "{yes}");
        }
        for no in ["false", "off", "0", "no", "f", "n", "of"] {
            assert_eq!(of(no), Replication::None, "{no}");
        }
        assert_eq!(of("database"), Replication::Logical);
        assert_eq!(good(b"user\0a\0\0").replication(), Replication::None);
    }
}
