//! The few messages of a login, read one at a time and never beyond their end: what follows belongs to somebody else.

use std::io;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// PostgreSQL's PG_MAX_SASL_MESSAGE_LENGTH: whoever has not shown who he is yet makes nobody hold more.
const LONGEST_RESPONSE: usize = 1024;
/// An ErrorResponse of a backend; anything else before AuthenticationOk is far shorter.
const LONGEST_ANSWER: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The other side is gone, or its socket broke.
    #[error("{0}")]
    Gone(#[from] io::Error),
    /// Not what the protocol has at this point.
    #[error("{0}")]
    Protocol(String),
}

pub struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
}

/// A `p` message of a client.
pub async fn client_response(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, ReadError> {
    // Tag first: a client that says something else may not know what a length is.
    let tag = stream.read_u8().await?;
    if tag != b'p' {
        return Err(ReadError::Protocol(format!("expected SASL response, got message type {tag}")));
    }
    body(stream, LONGEST_RESPONSE).await
}

/// Any message of a backend.
pub async fn server_message(stream: &mut (impl AsyncRead + Unpin)) -> Result<Message, ReadError> {
    let tag = stream.read_u8().await?;
    Ok(Message { tag, body: body(stream, LONGEST_ANSWER).await? })
}

async fn body(stream: &mut (impl AsyncRead + Unpin), longest: usize) -> Result<Vec<u8>, ReadError> {
    let length = stream.read_i32().await?;
    let length = usize::try_from(length).ok().and_then(|n| n.checked_sub(4)).filter(|n| *n <= longest);
    let length = length.ok_or_else(|| ReadError::Protocol("invalid message length".to_owned()))?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// The mechanism and the first words of a SASLInitialResponse.
pub fn initial_response(body: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let (mechanism, rest) = (&body[..end], &body[end + 1..]);
    let (length, data) = rest.split_first_chunk::<4>()?;
    match i32::from_be_bytes(*length) {
        -1 if data.is_empty() => Some((mechanism, None)),
        length if usize::try_from(length) == Ok(data.len()) => Some((mechanism, Some(data))),
        _ => None,
    }
}

const SASL: i32 = 10;
const SASL_CONTINUE: i32 = 11;
const SASL_FINAL: i32 = 12;

pub fn offer(mechanisms: &[&str], out: &mut BytesMut) {
    framed(b'R', out, |out| {
        out.put_i32(SASL);
        for mechanism in mechanisms {
            c_string(mechanism, out);
        }
        out.put_u8(0);
    });
}

pub fn challenge(data: &str, out: &mut BytesMut) {
    authentication(SASL_CONTINUE, data, out);
}

/// AuthenticationSASLFinal and AuthenticationOk, as PostgreSQL sends them: one after the other.
pub fn proven(data: &str, out: &mut BytesMut) {
    authentication(SASL_FINAL, data, out);
    authentication(0, "", out);
}

pub fn ok(out: &mut BytesMut) {
    authentication(0, "", out);
}

fn authentication(kind: i32, data: &str, out: &mut BytesMut) {
    framed(b'R', out, |out| {
        out.put_i32(kind);
        out.put_slice(data.as_bytes());
    });
}

pub fn sasl_initial(mechanism: &str, data: &str, out: &mut BytesMut) {
    framed(b'p', out, |out| {
        c_string(mechanism, out);
        out.put_i32(i32::try_from(data.len()).unwrap_or(i32::MAX));
        out.put_slice(data.as_bytes());
    });
}

pub fn sasl_response(data: &str, out: &mut BytesMut) {
    framed(b'p', out, |out| out.put_slice(data.as_bytes()));
}

/// What an authentication message of a backend asks for.
pub enum Asked<'a> {
    Nothing,
    Sasl(Vec<&'a [u8]>),
    Continue(&'a [u8]),
    Final(&'a [u8]),
    /// Another method, by its number.
    Other(i32),
}

pub fn asked(body: &[u8]) -> Option<Asked<'_>> {
    let (kind, data) = body.split_first_chunk::<4>()?;
    Some(match i32::from_be_bytes(*kind) {
        0 => Asked::Nothing,
        SASL => Asked::Sasl(data.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect()),
        SASL_CONTINUE => Asked::Continue(data),
        SASL_FINAL => Asked::Final(data),
        other => Asked::Other(other),
    })
}

/// A field of an ErrorResponse.
pub fn error_field(body: &[u8], field: u8) -> Option<String> {
    let fields = body.split(|byte| *byte == 0);
    let found = fields.filter_map(|text| text.split_first()).find(|(name, _)| **name == field)?;
    Some(String::from_utf8_lossy(found.1).into_owned())
}

fn c_string(text: &str, out: &mut BytesMut) {
    out.put_slice(text.as_bytes());
    out.put_u8(0);
}

fn framed(tag: u8, out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_i32(0);
    write(out);
    let length = i32::try_from(out.len() - at).unwrap_or(i32::MAX);
    out[at..at + 4].copy_from_slice(&length.to_be_bytes());
}
