//! The first packets of a connection: whose it is, whether it is encrypted, what it wants.

use std::net::SocketAddr;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::door::Door;
use crate::endpoint::hooks::{Hello, Peer, Refusal, TlsFacts};
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::proxy::{self, Port};
use crate::endpoint::wire::startup::{self, First};

/// A TLS record of type handshake.
const TLS_HANDSHAKE: u8 = 0x16;
const PROXY_BEGINS: u8 = proxy::SIGNATURE[0];

pub enum Wish {
    Session(Box<Hello>),
    Cancel {
        key: Bytes,
        peer: Peer,
    },
    /// Nothing that deserves an answer.
    Nothing,
}

pub struct Opened {
    pub stream: Stream,
    pub wish: Wish,
    /// Read beyond the startup packet.
    pub rest: BytesMut,
}

/// What went wrong, with the stream to say it on.
pub struct Failed {
    pub stream: Option<Stream>,
    pub refusal: Refusal,
}

/// Until the startup packet is there. The caller sets the deadline.
pub async fn open(door: &Door, stream: Stream, address: Option<SocketAddr>, port: Port) -> Result<Opened, Failed> {
    let peer = Peer { address: address.map(|a| a.ip().to_canonical()), via: None, identity: None, port, hop: false };
    let mut opener = Opener { stream, buffer: BytesMut::new(), peer, tls: None, asked_ssl: false, asked_gss: false };
    match opener.first_packet(door).await {
        Ok(wish) => Ok(Opened { stream: opener.stream, wish, rest: opener.buffer }),
        Err(Problem::Gone) => Ok(Opened { stream: opener.stream, wish: Wish::Nothing, rest: BytesMut::new() }),
        Err(Problem::Lost) => Err(Failed { stream: None, refusal: Refusal::violation("the TLS handshake failed") }),
        Err(Problem::Refused(refusal)) => Err(Failed { stream: Some(opener.stream), refusal }),
    }
}

struct Opener {
    stream: Stream,
    buffer: BytesMut,
    peer: Peer,
    tls: Option<TlsFacts>,
    asked_ssl: bool,
    asked_gss: bool,
}

enum Problem {
    /// The other side closed, or speaks nothing that we could answer in.
    Gone,
    /// The stream went into a handshake that failed.
    Lost,
    Refused(Refusal),
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        Problem::Refused(refusal)
    }
}

impl Opener {
    async fn first_packet(&mut self, door: &Door) -> Result<Wish, Problem> {
        self.read_until(1).await?;
        if self.buffer[0] == PROXY_BEGINS {
            self.proxy_header(door).await?;
            self.read_until(1).await?;
        }
        if self.buffer[0] == TLS_HANDSHAKE {
            self.asked_ssl = true;
            self.asked_gss = true;
            self.start_tls(door, true).await?;
        }
        loop {
            let length = loop {
                match startup::packet_length(&self.buffer)? {
                    Some(length) => break length,
                    None => self.read_until(4).await?,
                }
            };
            self.read_until(length).await?;
            let packet = self.buffer.split_to(length);
            match startup::parse(&packet)? {
                First::Ssl => self.ssl_request(door).await?,
                First::Gssenc => {
                    let again = std::mem::replace(&mut self.asked_gss, true);
                    self.nothing_more(again, "GSSAPI encryption")?;
                    self.answer(b"N").await?;
                }
                First::Cancel(key) => return Ok(Wish::Cancel { key, peer: self.peer.clone() }),
                First::Startup(startup) => {
                    let (peer, tls) = (self.peer.clone(), self.tls.clone());
                    return Ok(Wish::Session(Box::new(Hello { startup, peer, tls })));
                }
            }
        }
    }

    async fn proxy_header(&mut self, door: &Door) -> Result<(), Problem> {
        let length = loop {
            match proxy::header_length(&self.buffer)? {
                Some(length) => break length,
                None => {
                    let more = self.buffer.len() + 1;
                    self.read_until(more).await?;
                }
            }
        };
        self.read_until(length).await?;
        let header = proxy::parse(&self.buffer.split_to(length))?;
        let trusted = self.peer.address.is_none_or(|address| door.trusts(address));
        if let Some(port) = header.port {
            // One of our fronts: this connection goes no further, whoever says so.
            self.peer.hop = true;
            self.peer.port = port;
        }
        // From anybody else what it says is read and not believed.
        if trusted {
            if header.client.is_some() || header.port.is_some() {
                self.peer.address = header.client.map(|client| client.ip().to_canonical());
            }
            self.peer.via = header.via;
            self.peer.identity = header.identity;
        }
        Ok(())
    }

    async fn ssl_request(&mut self, door: &Door) -> Result<(), Problem> {
        let again = std::mem::replace(&mut self.asked_ssl, true);
        self.nothing_more(again, "SSL")?;
        if door.hooks().tls.is_none() || !matches!(self.stream, Stream::Tcp(_)) {
            return self.answer(b"N").await;
        }
        self.answer(b"S").await?;
        self.asked_gss = true;
        self.start_tls(door, false).await
    }

    /// Each request once, and nothing sent along with it: bytes from before the encryption must not count as from inside.
    fn nothing_more(&self, again: bool, what: &str) -> Result<(), Problem> {
        if again {
            return Err(Refusal::violation(format!("{what} was asked for twice")).into());
        }
        if self.buffer.has_remaining() {
            return Err(Refusal::violation(format!("received unencrypted data after {what} request"))
                .hint(
                    "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
                )
                .into());
        }
        Ok(())
    }

    async fn start_tls(&mut self, door: &Door, direct: bool) -> Result<(), Problem> {
        let hooks = door.hooks();
        let Some(tls) = hooks.tls.clone() else { return Err(Problem::Gone) };
        let first = self.buffer.split().freeze();
        let (placeholder, _) = tokio::net::UnixStream::pair().map_err(|_| Problem::Gone)?;
        let socket = match std::mem::replace(&mut self.stream, Stream::Unix(placeholder)) {
            Stream::Tcp(socket) => socket,
            Stream::Unix(_) | Stream::Layered(_) => return Err(Problem::Lost),
        };
        let (layer, facts) = tls.accept(socket, direct, first).await.map_err(|_| Problem::Lost)?;
        self.stream = Stream::Layered(layer);
        self.tls = Some(facts);
        Ok(())
    }

    async fn answer(&mut self, byte: &[u8]) -> Result<(), Problem> {
        self.stream.write_all(byte).await.map_err(|_| Problem::Gone)
    }

    /// More than a packet at a time is read only where the client sends more.
    async fn read_until(&mut self, length: usize) -> Result<(), Problem> {
        while self.buffer.len() < length {
            self.buffer.reserve(1024);
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) | Err(_) => return Err(Problem::Gone),
                Ok(_) => {}
            }
        }
        Ok(())
    }
}
