//! From the startup message to ReadyForQuery, where PostgreSQL itself asks who the client is.
//!
//! The exchange is passed on message by message. What is not passed as it came: the list of SASL mechanisms where our own
//! TLS is in between, the version negotiation where we answer for less than the server, and the cancel key.

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::endpoint::hooks::Refusal;
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::message;
use crate::endpoint::wire::startup::Startup;

/// Longest message of a server before ReadyForQuery, and of a client's answer to a question (PostgreSQL's own limit).
const LONGEST: usize = 65_535;

/// Why it did not come to ReadyForQuery.
#[derive(Debug)]
pub enum Failure {
    /// The client closed, or the server said no and the client heard it.
    Over,
    /// PostgreSQL cannot take anybody now, and the client has heard nothing yet: another try may succeed.
    NotNow(String),
    Refused(Refusal),
}

/// Where a session stands when PostgreSQL is ready for queries.
pub struct Ready {
    /// PostgreSQL's own key; empty when it told none.
    pub backend_key: Bytes,
    pub from_client: BytesMut,
    pub from_backend: BytesMut,
}

/// Both ends before they are a session.
pub struct Ends<'a> {
    pub client: &'a mut Stream,
    pub backend: &'a mut Stream,
    /// Read and not used yet.
    pub from_client: BytesMut,
    pub from_backend: BytesMut,
}

impl Ends<'_> {
    /// Sends the startup message and passes the exchange on until AuthenticationOk.
    pub async fn authenticate(&mut self, startup: &Startup, through_tls: bool) -> Result<(), Failure> {
        let lost = |_| Failure::NotNow("PostgreSQL closed the connection".to_owned());
        self.backend.write_all(&startup.to_bytes()).await.map_err(lost)?;
        let unknown = startup.protocol_options();
        let mut negotiation =
            Negotiation { asked: startup.minor, spoken: startup.spoken_minor(), unknown, done: false };
        let mut asked_for_proof = false;
        // libpq takes nothing but R, v and E before AuthenticationOk.
        let mut notices = BytesMut::new();
        let mut spoken = false;
        loop {
            let (tag, bytes) = match self.server_message().await {
                Ok(read) => read,
                Err(_) if !spoken => return Err(Failure::NotNow("PostgreSQL closed the connection".to_owned())),
                Err(failure) => return Err(failure),
            };
            let body = &bytes[5..];
            match tag {
                b'E' => {
                    let code = message::field(body, b'C').unwrap_or_default();
                    if !spoken && code == b"57P03" {
                        let text = message::field(body, b'M').unwrap_or_default();
                        return Err(Failure::NotNow(String::from_utf8_lossy(text).into_owned()));
                    }
                    self.tell(&bytes).await?;
                    return Err(Failure::Over);
                }
                b'N' => notices.extend_from_slice(&bytes),
                b'v' => {
                    let answer = negotiation.answer(Some(body)).map_err(Failure::Refused)?;
                    if let Some(answer) = answer {
                        spoken = true;
                        self.tell(&answer).await?;
                    }
                }
                b'R' => {
                    let first = negotiation.answer(None).map_err(Failure::Refused)?;
                    if let Some(answer) = first {
                        self.tell(&answer).await?;
                    }
                    spoken = true;
                    let kind = body.get(..4).map(|kind| u32::from_be_bytes([kind[0], kind[1], kind[2], kind[3]]));
                    if kind == Some(0) {
                        // Peer or trust would have let in the endpoint, not the client.
                        if !asked_for_proof {
                            return Err(Failure::Refused(no_proof()));
                        }
                        self.tell(&bytes).await?;
                        return self.tell(&notices).await;
                    }
                    let stripped = if through_tls { message::without_channel_binding(body) } else { None };
                    self.tell(stripped.as_ref().unwrap_or(&bytes)).await?;
                    // Cleartext, MD5, SASL: a secret is asked for; GSS and SSPI prove somebody too. After SASLFinal the
                    // server goes on by itself.
                    if matches!(kind, Some(3 | 5 | 7 | 8 | 9 | 10 | 11)) {
                        asked_for_proof = true;
                        let answer = self.client_answer().await?;
                        self.backend.write_all(&answer).await.map_err(lost)?;
                    }
                }
                _ => return Err(unexpected(tag)),
            }
        }
    }

    /// Passes on what a server tells of itself, but for its key, until it is ready. `our_key` goes in the key's place.
    pub async fn greet(mut self, our_key: impl FnOnce(Bytes) -> Result<Bytes, Refusal>) -> Result<Ready, Failure> {
        let mut our_key = Some(our_key);
        let mut backend_key = Bytes::new();
        // In one piece to the client, as PostgreSQL sends it.
        let mut greeting = BytesMut::new();
        loop {
            let (tag, bytes) = self.server_message().await?;
            match tag {
                b'K' => {
                    backend_key = bytes.slice(5..);
                    if let Some(our_key) = our_key.take() {
                        let key = our_key(backend_key.clone()).map_err(Failure::Refused)?;
                        greeting.extend_from_slice(&message::backend_key(&key));
                    }
                }
                b'S' | b'N' => greeting.extend_from_slice(&bytes),
                b'E' => {
                    greeting.extend_from_slice(&bytes);
                    self.tell(&greeting).await?;
                    return Err(Failure::Over);
                }
                b'Z' => {
                    greeting.extend_from_slice(&bytes);
                    self.tell(&greeting).await?;
                    return Ok(Ready { backend_key, from_client: self.from_client, from_backend: self.from_backend });
                }
                _ => return Err(unexpected(tag)),
            }
        }
    }

    async fn tell(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.client.write_all(bytes).await.map_err(|_| Failure::Over)?;
        self.client.flush().await.map_err(|_| Failure::Over)
    }

    async fn server_message(&mut self) -> Result<(u8, Bytes), Failure> {
        let read = read_message(self.backend, &mut self.from_backend);
        // A client that leaves while PostgreSQL thinks takes its connection with it.
        match read.await {
            Ok(Some(bytes)) => Ok((bytes[0], bytes)),
            Ok(None) => Err(Failure::Refused(Refusal::new("08006", "PostgreSQL closed the connection"))),
            Err(TooLong(tag)) => Err(unexpected(tag)),
        }
    }

    async fn client_answer(&mut self) -> Result<Bytes, Failure> {
        match read_message(self.client, &mut self.from_client).await {
            Ok(Some(bytes)) if bytes[0] == b'p' => Ok(bytes),
            Ok(Some(bytes)) => Err(Failure::Refused(Refusal::violation(format!(
                "expected password response, got message type {}",
                bytes[0]
            )))),
            Ok(None) => Err(Failure::Over),
            Err(TooLong(_)) => Err(Failure::Refused(Refusal::violation("invalid message length"))),
        }
    }
}

fn unexpected(tag: u8) -> Failure {
    let tag = char::from(tag).escape_default().to_string();
    Failure::Refused(Refusal::new("08P01", format!("PostgreSQL sent an unexpected message `{tag}` at startup")))
}

fn no_proof() -> Refusal {
    Refusal::new("28000", "PostgreSQL asked for no password")
        .detail("pg_hba.conf lets in without one whoever comes over the unix socket, and so does the endpoint.")
        .hint("Have lines of type local say scram-sha-256.")
}

struct TooLong(u8);

/// A whole message with its header; `None`: the stream ended. Cancel-safe: what was read stays in `buffer`.
async fn read_message(stream: &mut Stream, buffer: &mut BytesMut) -> Result<Option<Bytes>, TooLong> {
    loop {
        if buffer.len() >= 5 {
            let length = u32::from_be_bytes([buffer[1], buffer[2], buffer[3], buffer[4]]) as usize;
            if !(4..=LONGEST).contains(&length) {
                return Err(TooLong(buffer[0]));
            }
            if buffer.remaining() > length {
                return Ok(Some(buffer.split_to(length + 1).freeze()));
            }
        }
        buffer.reserve(1024);
        match stream.read_buf(buffer).await {
            Ok(0) | Err(_) => return Ok(None),
            Ok(_) => {}
        }
    }
}

/// Exactly one NegotiateProtocolVersion, or none.
struct Negotiation {
    asked: u16,
    spoken: u16,
    unknown: Vec<Bytes>,
    done: bool,
}

impl Negotiation {
    /// `server`: the body of the server's own; without it the server takes what it was sent.
    fn answer(&mut self, server: Option<&[u8]>) -> Result<Option<Bytes>, Refusal> {
        if self.done {
            return if server.is_some() {
                Err(Refusal::new("08P01", "PostgreSQL negotiated the protocol version twice"))
            } else {
                Ok(None)
            };
        }
        self.done = true;
        let mut unknown = self.unknown.clone();
        if let Some(body) = server {
            let (minor, names) = message::read_negotiate(body)
                .ok_or_else(|| Refusal::new("08P01", "PostgreSQL's version negotiation cannot be read"))?;
            self.spoken = self.spoken.min(minor);
            unknown.extend(names);
        }
        let as_asked = self.spoken == self.asked && unknown.is_empty();
        Ok((!as_asked).then(|| message::negotiate(self.spoken, &unknown)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiation(asked: u16, unknown: &[&'static str]) -> Negotiation {
        let unknown = unknown.iter().map(|name| Bytes::from_static(name.as_bytes())).collect();
        Negotiation { asked, spoken: asked.min(2), unknown, done: false }
    }

    fn body(minor: u16) -> Bytes {
        message::negotiate(minor, &[]).slice(5..)
    }

    #[test]
    fn the_version_is_negotiated_once_and_for_the_least_of_all() {
        let says =
            |answer: Result<Option<Bytes>, Refusal>| answer.unwrap().map(|m| message::read_negotiate(&m[5..]).unwrap());
        assert_eq!(says(negotiation(0, &[]).answer(None)), None);
        assert_eq!(says(negotiation(2, &[]).answer(None)), None);
        assert_eq!(says(negotiation(2, &[]).answer(Some(&body(0)))), Some((0, vec![])), "an older server");
        assert_eq!(says(negotiation(9999, &[]).answer(None)), Some((2, vec![])), "a newer client");
        let grease = says(negotiation(9999, &["_pq_.grease"]).answer(Some(&body(0))));
        assert_eq!(grease, Some((0, vec![Bytes::from_static(b"_pq_.grease")])));
        let mut twice = negotiation(2, &[]);
        assert!(twice.answer(Some(&body(0))).is_ok());
        assert!(twice.answer(Some(&body(0))).is_err() && twice.answer(None).unwrap().is_none());
    }
}
