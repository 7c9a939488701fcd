//! The few messages that the endpoint writes itself, and the few bodies that it reads.

use bytes::{BufMut, Bytes, BytesMut};

/// Why somebody is not let in, or not kept: an ErrorResponse of severity FATAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub sqlstate: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Refusal {
    pub fn new(sqlstate: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { sqlstate, message: message.into(), detail: None, hint: None }
    }

    pub fn detail(self, detail: impl Into<String>) -> Refusal {
        Refusal { detail: Some(detail.into()), ..self }
    }

    pub fn hint(self, hint: impl Into<String>) -> Refusal {
        Refusal { hint: Some(hint.into()), ..self }
    }

    /// 08P01: what was sent is not the protocol.
    pub fn violation(message: impl Into<String>) -> Refusal {
        Refusal::new("08P01", message)
    }

    pub fn to_bytes(&self) -> Bytes {
        let mut fields = vec![(b'S', "FATAL"), (b'V', "FATAL"), (b'C', self.sqlstate), (b'M', self.message.as_str())];
        fields.extend(self.detail.as_deref().map(|text| (b'D', text)));
        fields.extend(self.hint.as_deref().map(|text| (b'H', text)));
        message(b'E', |body| {
            for (code, text) in fields {
                body.put_u8(code);
                // A zero inside would end the field early and make the rest unreadable.
                body.put_slice(text.replace('\0', " ").as_bytes());
                body.put_u8(0);
            }
            body.put_u8(0);
        })
    }
}

/// A message with its length filled in.
pub fn message(tag: u8, fill: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(tag);
    out.put_u32(0);
    fill(&mut out);
    let length = u32::try_from(out.len() - 1).unwrap_or(u32::MAX);
    out[1..5].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

/// NegotiateProtocolVersion: the newest minor version that is spoken, and the options that are not known.
pub fn negotiate(minor: u16, unknown: &[Bytes]) -> Bytes {
    message(b'v', |body| {
        // Version 3.minor as PostgreSQL writes it. (Before 18 servers wrote the bare number of 3.0, which is the same.)
        body.put_u32(3 << 16 | u32::from(minor));
        body.put_u32(u32::try_from(unknown.len()).unwrap_or(0));
        for name in unknown {
            body.put_slice(name);
            body.put_u8(0);
        }
    })
}

/// Minor version and unknown options of a server's NegotiateProtocolVersion.
pub fn read_negotiate(body: &[u8]) -> Option<(u16, Vec<Bytes>)> {
    let version = u32::from_be_bytes(body.get(..4)?.try_into().ok()?);
    let count = u32::from_be_bytes(body.get(4..8)?.try_into().ok()?);
    let names: Vec<Bytes> =
        body[8..].split(|b| *b == 0).filter(|name| !name.is_empty()).map(Bytes::copy_from_slice).collect();
    // Servers before 18 wrote the minor version alone; ours is always below 65536 either way.
    (names.len() == count as usize).then_some(((version & 0xffff) as u16, names))
}

pub fn backend_key(key: &[u8]) -> Bytes {
    message(b'K', |body| body.put_slice(key))
}

/// A field of an ErrorResponse or NoticeResponse.
pub fn field(body: &[u8], code: u8) -> Option<&[u8]> {
    let mut rest = body;
    while let Some((found, after)) = rest.split_first() {
        if *found == 0 {
            return None;
        }
        let end = after.iter().position(|b| *b == 0)?;
        if *found == code {
            return Some(&after[..end]);
        }
        rest = &after[end + 1..];
    }
    None
}

/// AuthenticationSASL without the mechanism that binds to a TLS channel which ends here: a client behind our own TLS would
/// be refused by PostgreSQL, and one without refuses to go on. `None`: nothing to take away.
pub fn without_channel_binding(body: &[u8]) -> Option<Bytes> {
    let (kind, list) = body.split_at_checked(4)?;
    if kind != 10_u32.to_be_bytes() {
        return None;
    }
    let names: Vec<&[u8]> = list.split(|b| *b == 0).filter(|name| !name.is_empty()).collect();
    let kept: Vec<&[u8]> = names.iter().filter(|name| !name.ends_with(b"-PLUS")).copied().collect();
    (kept.len() < names.len()).then(|| {
        message(b'R', |out| {
            out.put_u32(10);
            for name in kept {
                out.put_slice(name);
                out.put_u8(0);
            }
            out.put_u8(0);
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_an_error_response_that_can_be_read_back() {
        let refusal = Refusal::new("57P03", "no primary\0 now").detail("electing").hint("wait");
        let bytes = refusal.to_bytes();
        assert_eq!((bytes[0], bytes.len() - 1), (b'E', u32::from_be_bytes(bytes[1..5].try_into().unwrap()) as usize));
        let body = &bytes[5..];
        assert_eq!(field(body, b'C'), Some(&b"57P03"[..]));
        assert_eq!(field(body, b'M'), Some(&b"no primary  now"[..]));
        assert_eq!(field(body, b'H'), Some(&b"wait"[..]));
        assert_eq!(field(body, b'R'), None);
    }

    #[test]
    fn fields_of_broken_bodies_are_absent() {
        for body in [&b""[..], b"C", b"Cno end", b"\0"] {
            assert_eq!(field(body, b'C'), None);
        }
    }

    #[test]
    fn negotiation_reads_back() {
        let names = vec![Bytes::from_static(b"_pq_.test"), Bytes::from_static(b"_pq_.other")];
        assert_eq!(read_negotiate(&negotiate(2, &names)[5..]), Some((2, names)));
        assert_eq!(read_negotiate(&negotiate(0, &[])[5..]), Some((0, vec![])));
        assert_eq!(read_negotiate(b"short"), None);
    }

    #[test]
    fn channel_binding_is_taken_away_and_nothing_else() {
        let offer = |names: &[u8]| [&10_u32.to_be_bytes(), names].concat();
        let plus = offer(b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
        assert_eq!(without_channel_binding(&plus).unwrap()[5..], offer(b"SCRAM-SHA-256\0\0"));
        assert_eq!(without_channel_binding(&offer(b"SCRAM-SHA-256\0\0")), None);
        assert_eq!(without_channel_binding(&0_u32.to_be_bytes()), None);
    }
}
