//! PROXY protocol, version 2: a front on another host tells the gate whose connection it passes on.
//!
//! Its signature cannot begin a packet of PostgreSQL, so one port takes clients and fronts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::message::Refusal;

pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const HEAD: usize = 16;
/// Ours are below 300 bytes; a load balancer's with certificates stays below this.
const LONGEST: usize = 4096;

/// Kinds of fields that are ours (the range PP2_TYPE_MIN_CUSTOM…MAX_CUSTOM).
const FIELD_PORT: u8 = 0xe0;
const FIELD_VIA: u8 = 0xe1;
const FIELD_IDENTITY: u8 = 0xe2;

/// Which of our ports the client came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Port {
    ReadWrite,
    ReadOnly,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `None`: a health check of a load balancer, or a client on a unix socket.
    pub client: Option<SocketAddr>,
    /// Present: the sender is one of our fronts, so this connection ends here and goes no further.
    pub port: Option<Port>,
    /// The router or member that speaks.
    pub via: Option<String>,
    /// Whom the front recognised (name of a verified client certificate).
    pub identity: Option<String>,
}

/// How many bytes the header has in all, once that is known.
pub fn header_length(buffer: &[u8]) -> Result<Option<usize>, Refusal> {
    let Some(head) = buffer.get(..HEAD) else { return Ok(None) };
    let length = HEAD + usize::from(u16::from_be_bytes([head[14], head[15]]));
    if head[..12] != SIGNATURE || head[12] >> 4 != 2 || length > LONGEST {
        return Err(Refusal::violation("invalid PROXY protocol header"));
    }
    Ok(Some(length))
}

pub fn parse(bytes: &[u8]) -> Result<Header, Refusal> {
    read(bytes).ok_or_else(|| Refusal::violation("invalid PROXY protocol header"))
}

fn read(bytes: &[u8]) -> Option<Header> {
    let (head, body) = bytes.split_at_checked(HEAD)?;
    let mut header = Header::default();
    // Command LOCAL: the sender speaks for itself; addresses in it mean nothing.
    let local = match head[12] & 0xf {
        0 => true,
        1 => false,
        _ => return None,
    };
    let fields = match head[13] >> 4 {
        1 => {
            let (addresses, fields) = body.split_first_chunk::<12>()?;
            let [a, b, c, d, _, _, _, _, p, q, _, _] = *addresses;
            header.client = Some((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([p, q])).into());
            fields
        }
        2 => {
            let (addresses, fields) = body.split_first_chunk::<36>()?;
            let source: [u8; 16] = addresses[..16].try_into().ok()?;
            header.client = Some((Ipv6Addr::from(source), u16::from_be_bytes([addresses[32], addresses[33]])).into());
            fields
        }
        3 => body.get(216..)?,
        _ => body,
    };
    if local {
        header.client = None;
    }
    let mut rest = fields;
    while !rest.is_empty() {
        let (kind, after) = rest.split_first()?;
        let (length, after) = after.split_first_chunk::<2>()?;
        let (value, after) = after.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        match *kind {
            FIELD_PORT => {
                header.port = Some(match value {
                    b"rw" => Port::ReadWrite,
                    b"ro" => Port::ReadOnly,
                    _ => return None,
                });
            }
            FIELD_VIA => header.via = Some(std::str::from_utf8(value).ok()?.to_owned()),
            FIELD_IDENTITY => header.identity = Some(std::str::from_utf8(value).ok()?.to_owned()),
            _ => {}
        }
        rest = after;
    }
    Some(header)
}

impl Header {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let family = match self.client.map(|client| (client.ip().to_canonical(), client.port())) {
            None => 0,
            Some((IpAddr::V4(address), port)) => {
                body.extend(address.octets());
                body.extend([0; 4]);
                body.extend(port.to_be_bytes());
                body.extend([0; 2]);
                0x11
            }
            Some((IpAddr::V6(address), port)) => {
                body.extend(address.octets());
                body.extend([0; 16]);
                body.extend(port.to_be_bytes());
                body.extend([0; 2]);
                0x21
            }
        };
        let mut field = |kind: u8, value: &str| {
            let value = &value.as_bytes()[..value.len().min(1000)];
            body.push(kind);
            body.extend((value.len() as u16).to_be_bytes());
            body.extend(value);
        };
        if let Some(port) = self.port {
            field(FIELD_PORT, if port == Port::ReadWrite { "rw" } else { "ro" });
        }
        if let Some(via) = &self.via {
            field(FIELD_VIA, via);
        }
        if let Some(identity) = &self.identity {
            field(FIELD_IDENTITY, identity);
        }
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0x21, family]);
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend(body);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(client: &str) -> Header {
        Header {
            client: Some(client.parse().unwrap()),
            port: Some(Port::ReadOnly),
            via: Some("region-a".to_owned()),
            identity: Some("maas-regiond-7".to_owned()),
        }
    }

    #[test]
    fn headers_read_back() {
        for header in [full("10.0.0.7:51234"), full("[fd00::7]:9"), Header::default()] {
            let bytes = header.to_bytes();
            assert_eq!(header_length(&bytes), Ok(Some(bytes.len())));
            assert_eq!(parse(&bytes), Ok(header));
        }
        assert_eq!(parse(&full("[::ffff:10.0.0.7]:1").to_bytes()).unwrap().client, "10.0.0.7:1".parse().ok());
    }

    #[test]
    fn every_cut_is_waited_for_or_refused() {
        let bytes = full("10.0.0.7:51234").to_bytes();
        for end in 0..HEAD {
            assert_eq!(header_length(&bytes[..end]), Ok(None));
        }
        for end in 0..bytes.len() {
            // A cut between two fields reads as fewer fields; the length in the head is what refuses it.
            assert!(end < HEAD || header_length(&bytes[..end]).unwrap() > Some(end));
        }
    }

    #[test]
    fn what_others_send_is_read_as_far_as_it_matters() {
        let mut local = full("10.0.0.7:1").to_bytes();
        local[12] = 0x20;
        assert_eq!(parse(&local).unwrap().client, None, "LOCAL speaks for nobody");
        let mut version1 = local.clone();
        version1[12] = 0x11;
        assert!(header_length(&version1).is_err());
        let mut foreign = Header::default().to_bytes();
        foreign.extend([0x20, 0, 2, 1, 2]);
        foreign[15] = 5;
        assert_eq!(parse(&foreign), Ok(Header::default()));
    }
}
