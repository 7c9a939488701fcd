//! What a session asks of others: who are you, may you come in, and how is the line encrypted. `run.rs` puts them together.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;

use super::stream::{Layer, Stream};
pub use super::wire::message::Refusal;
use super::wire::proxy::Port;
use super::wire::startup::Startup;
use crate::core::names::MemberName;

#[derive(Clone)]
pub struct Hooks {
    pub authenticator: Arc<dyn Authenticator>,
    pub ledger: Arc<dyn Ledger>,
    /// `None`: clients are told that there is no TLS.
    pub tls: Option<Arc<dyn TlsAcceptor>>,
    /// Between fronts and gates of other hosts; `None`: plain.
    pub upstream_tls: Option<Arc<dyn TlsConnector>>,
}

/// What is known of a client when it has said what it wants.
#[derive(Clone, Debug)]
pub struct Hello {
    pub startup: Startup,
    pub peer: Peer,
    pub tls: Option<TlsFacts>,
}

#[derive(Clone, Debug)]
pub struct Peer {
    /// The client's own address, as far as the one who told it is believed; `None`: a unix socket.
    pub address: Option<IpAddr>,
    /// The front that speaks for it.
    pub via: Option<String>,
    /// Whom that front recognised.
    pub identity: Option<String>,
    pub port: Port,
    /// It came from one of our fronts: this connection ends here.
    pub hop: bool,
}

#[derive(Clone, Debug, Default)]
pub struct TlsFacts {
    /// The name in a client certificate that was verified.
    pub certificate: Option<String>,
}

/// Whom the ledger counts for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    pub database: String,
    pub application_name: String,
    pub address: Option<IpAddr>,
    pub certificate: Option<String>,
    pub via: Option<String>,
}

impl Hello {
    /// What the client says of itself; nothing of it is proven yet.
    pub fn claimed(&self) -> Identity {
        let certificate = self.tls.as_ref().and_then(|tls| tls.certificate.clone());
        Identity {
            user: self.startup.user(),
            database: self.startup.database(),
            application_name: self.startup.text("application_name"),
            address: self.peer.address,
            certificate: certificate.or_else(|| self.peer.identity.clone()),
            via: self.peer.via.clone(),
        }
    }
}

#[async_trait]
pub trait Authenticator: Send + Sync {
    /// Finds out who the client is, or leaves that to PostgreSQL. A refusal is told to the client by the caller.
    async fn authenticate(&self, client: &mut Stream, hello: &Hello) -> Result<Proof, Refusal>;
}

pub enum Proof {
    /// PostgreSQL asks; the exchange is passed on both ways.
    PassThrough,
    /// AuthenticationOk went to the client. `login` opens backends for it.
    Proven { identity: Identity, login: Arc<dyn BackendLogin> },
}

#[async_trait]
pub trait BackendLogin: Send + Sync {
    /// Sends the startup message and goes through the exchange; returns what was read beyond AuthenticationOk.
    async fn log_in(&self, backend: &mut Stream, startup: &Startup) -> Result<BytesMut, Refusal>;
}

#[async_trait]
pub trait Ledger: Send + Sync {
    /// Waits for a place, not for ever.
    async fn admit(&self, who: &Identity) -> Result<Permit, Refusal>;
}

/// A place in the ledger, given back when dropped.
pub struct Permit {
    _place: Box<dyn Send + Sync>,
}

impl Permit {
    pub fn new(place: impl Send + Sync + 'static) -> Permit {
        Permit { _place: Box::new(place) }
    }
}

#[async_trait]
pub trait TlsAcceptor: Send + Sync {
    /// `first`: bytes of the client's hello that were read already (direct TLS; then ALPN `postgresql` is asked for).
    async fn accept(&self, socket: TcpStream, direct: bool, first: Bytes) -> io::Result<(Box<dyn Layer>, TlsFacts)>;
}

#[async_trait]
pub trait TlsConnector: Send + Sync {
    async fn connect(&self, socket: TcpStream, member: &MemberName) -> io::Result<Box<dyn Layer>>;
}

/// Until something else is configured.
pub struct PassThrough;

#[async_trait]
impl Authenticator for PassThrough {
    async fn authenticate(&self, _: &mut Stream, _: &Hello) -> Result<Proof, Refusal> {
        Ok(Proof::PassThrough)
    }
}
