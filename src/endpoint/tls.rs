//! TLS of the endpoint's legs, each on its own: towards clients (our certificate, theirs if they have one), and between
//! endpoints of the cluster (both sides show one).
//!
//! The files are read again when they change or when somebody asks (SIGHUP); what cannot be used leaves the old ones in
//! force, loudly. Connections that stand keep the certificate that they began with.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{error, info};

use crate::config::EndpointTls;

use super::auth::TlsFacts;
use super::auth::end_point::end_point;
use super::auth::identity::ClientCertificate;
use super::hooks;
use super::stream::Layer;

/// What PostgreSQL's clients ask for (libpq 17 and later), and what direct TLS has to ask for.
const POSTGRESQL: &[u8] = b"postgresql";
/// How often files are looked at. They are compared by inode, size and time; a rename in place is seen, and so is a
/// changed link.
pub const LOOK: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {}: {why}", file.display())]
    File { file: PathBuf, why: String },
    #[error("{}: {why}", file.display())]
    Unusable { file: PathBuf, why: String },
}

impl TlsError {
    fn file(file: &Path, why: impl ToString) -> TlsError {
        TlsError::File { file: file.to_owned(), why: why.to_string() }
    }

    fn unusable(file: &Path, why: impl ToString) -> TlsError {
        TlsError::Unusable { file: file.to_owned(), why: why.to_string() }
    }
}

/// One reading of the files.
pub struct ServerTls {
    acceptor: TlsAcceptor,
    end_point: Option<Arc<[u8]>>,
}

/// How the client came to TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// SSLRequest, answered with `S`.
    Asked,
    /// At once (PostgreSQL 17's sslnegotiation=direct): only with ALPN, else any protocol's bytes could be meant.
    Direct,
}

impl ServerTls {
    pub fn read(files: &EndpointTls) -> Result<ServerTls, TlsError> {
        let chain = certificates(&files.cert_file)?;
        let key = private_key(&files.key_file)?;
        let end_point = chain.first().and_then(|certificate| end_point(certificate));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions: &[_] = if files.tls_1_3_only {
            &[&rustls::version::TLS13]
        } else {
            &[&rustls::version::TLS13, &rustls::version::TLS12]
        };
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(|why| TlsError::unusable(&files.cert_file, why))?;
        let builder = match &files.client_ca_file {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let roots = roots(file)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    // Who has to show one is said by endpoint.allow, after the user is known.
                    .allow_unauthenticated()
                    .build()
                    .map_err(|why| TlsError::unusable(file, why))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|why| TlsError::unusable(&files.cert_file, format!("certificate and key: {why}")))?;
        config.alpn_protocols = vec![POSTGRESQL.to_vec()];
        // A resumed session would carry the certificate of before the files changed past the check of today's authorities.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerTls { acceptor: TlsAcceptor::from(Arc::new(config)), end_point })
    }

    /// The handshake, from its first byte. The caller sets the deadline.
    pub async fn accept<S>(&self, stream: S, way: Way) -> io::Result<(TlsStream<S>, TlsFacts)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self.acceptor.accept(stream).await?;
        let connection = stream.get_ref().1;
        // An ALPN without ours has been refused by rustls; none at all is what older clients send after SSLRequest.
        if way == Way::Direct && connection.alpn_protocol() != Some(POSTGRESQL) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "direct TLS without the protocol \"postgresql\" (ALPN)",
            ));
        }
        let certificate = match connection.peer_certificates().and_then(|chain| chain.first()) {
            Some(der) => Some(ClientCertificate::read(der).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?),
            None => None,
        };
        Ok((stream, TlsFacts { end_point: self.end_point.clone(), certificate }))
    }

    pub fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }
}

// === Files ===

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = fs::read(file).map_err(|why| TlsError::file(file, why))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(|why| TlsError::unusable(file, why))?;
    if chain.is_empty() {
        return Err(TlsError::unusable(file, "holds no certificate (-----BEGIN CERTIFICATE-----)"));
    }
    Ok(chain)
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let metadata = fs::metadata(file).map_err(|why| TlsError::file(file, why))?;
    let mode = metadata.permissions().mode() & 0o7777;
    // As PostgreSQL: others never.
    if mode & 0o007 != 0 {
        let why = format!("has mode {mode:04o}: everybody on this machine can read the key; run `chmod 0600` on it");
        return Err(TlsError::unusable(file, why));
    }
    let pem = fs::read(file).map_err(|why| TlsError::file(file, why))?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|why| {
        TlsError::unusable(file, format!("holds no private key that can be used without a passphrase: {why}"))
    })
}

fn roots(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).map_err(|why| TlsError::unusable(file, why))?;
    }
    Ok(roots)
}

/// What a file is now: changed when this changes.
type Mark = Option<(u64, u64, i64, i64)>;

fn marks(files: &EndpointTls) -> Vec<Mark> {
    let all = [Some(&files.cert_file), Some(&files.key_file), files.client_ca_file.as_ref()];
    let mark = |file: &PathBuf| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
    };
    all.into_iter().flatten().map(mark).collect()
}

// === Kept up to date ===

/// The TLS that new connections get.
#[derive(Clone)]
pub struct Current(watch::Receiver<Arc<ServerTls>>);

impl Current {
    pub fn get(&self) -> Arc<ServerTls> {
        self.0.borrow().clone()
    }
}

/// Reads the files, and again whenever they change or `again` is notified. The first reading has to succeed. The future
/// never ends; whoever drops it keeps what was read last.
pub fn keep(
    files: EndpointTls,
    look: Duration,
    again: Arc<Notify>,
) -> Result<(Current, impl Future<Output = ()> + Send), TlsError> {
    let mut known = marks(&files);
    let (publish, current) = watch::channel(Arc::new(ServerTls::read(&files)?));
    let keeping = async move {
        let mut complained = String::new();
        loop {
            let asked = tokio::select! {
                () = again.notified() => true,
                () = tokio::time::sleep(look) => false,
            };
            let now = marks(&files);
            if now == known && !asked && complained.is_empty() {
                continue;
            }
            // Read again after an error even without a change: certificate and key come one after the other.
            match ServerTls::read(&files) {
                Ok(read) => {
                    info!(cert_file = %files.cert_file.display(), "endpoint: certificates read again");
                    complained.clear();
                    publish.send_replace(Arc::new(read));
                }
                Err(why) if why.to_string() != complained => {
                    complained = why.to_string();
                    error!(error = complained, "endpoint: the new certificates cannot be used; the old ones are kept");
                }
                Err(_) => {}
            }
            known = now;
        }
    };
    Ok((Current(current), keeping))
}

// === As the front knows it ===

#[async_trait]
impl hooks::TlsAcceptor for Current {
    async fn accept(&self, socket: TcpStream, direct: bool, first: Bytes) -> io::Result<(Box<dyn Layer>, TlsFacts)> {
        let way = if direct { Way::Direct } else { Way::Asked };
        let (stream, facts) = self.get().accept(Begun { first, socket }, way).await?;
        Ok((Box::new(stream), facts))
    }
}

/// A socket of which something has been read already.
pub struct Begun {
    first: Bytes,
    socket: TcpStream,
}

impl Layer for TlsStream<Begun> {
    fn socket(&self) -> Option<&TcpStream> {
        Some(&self.get_ref().0.socket)
    }
}

impl AsyncRead for Begun {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buffer);
        }
        let some = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.split_to(some));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Begun {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

// === Between endpoints ===

/// Towards another endpoint of the cluster: its certificate is checked against the cluster's authority, ours is shown.
pub fn peer_client(cert_file: &Path, key_file: &Path, ca_file: &Path, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|why| TlsError::unusable(cert_file, why))?
        .with_root_certificates(roots(ca_file)?)
        .with_client_auth_cert(certificates(cert_file)?, private_key(key_file)?)
        .map_err(|why| TlsError::unusable(cert_file, why))?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// From another endpoint of the cluster: without a certificate of the cluster's authority nobody gets a word.
pub fn peer_server(
    cert_file: &Path,
    key_file: &Path,
    ca_file: &Path,
    alpn: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca_file)?), provider.clone())
        .build()
        .map_err(|why| TlsError::unusable(ca_file, why))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|why| TlsError::unusable(cert_file, why))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(cert_file)?, private_key(key_file)?)
        .map_err(|why| TlsError::unusable(cert_file, why))?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

#[cfg(test)]
mod tests;
