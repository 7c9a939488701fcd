//! Connections towards PostgreSQL: over the unix socket here, or to the gate of another member.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::core::names::MemberName;
use crate::core::route::Place;
use crate::endpoint::hooks::TlsConnector;
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::proxy::{Header, Port};
use crate::endpoint::wire::startup;

/// Members are near each other; one that takes longer is not there.
const CONNECT: Duration = Duration::from_secs(3);
/// For the whole of a cancel, until PostgreSQL has closed its connection.
const CANCEL: Duration = Duration::from_secs(10);

/// PostgreSQL of this host.
#[derive(Clone, Debug)]
pub struct Local {
    pub socket_dir: PathBuf,
    pub port: u16,
}

impl Local {
    fn path(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }

    pub async fn connect(&self) -> io::Result<Stream> {
        unix(&self.path()).await
    }

    /// Passes a cancel on and waits until PostgreSQL has done it.
    pub async fn cancel(&self, key: &[u8]) -> io::Result<()> {
        within(CANCEL, async {
            let mut socket = UnixStream::connect(self.path()).await?;
            send_cancel(&mut socket, key).await
        })
        .await
    }
}

async fn unix(path: &Path) -> io::Result<Stream> {
    within(CONNECT, UnixStream::connect(path)).await.map(Stream::Unix)
}

/// The gate of another member.
pub async fn remote(
    member: &MemberName,
    place: &Place,
    header: &Header,
    tls: Option<&Arc<dyn TlsConnector>>,
) -> io::Result<Stream> {
    let port = match header.port {
        Some(Port::ReadOnly) => place.ports.read_only.unwrap_or(place.ports.read_write),
        Some(Port::ReadWrite) | None => place.ports.read_write,
    };
    within(CONNECT, async {
        let mut socket = TcpStream::connect((place.host.as_str(), port)).await?;
        socket.write_all(&header.to_bytes()).await?;
        match tls {
            None => Ok(Stream::tcp(socket)),
            Some(tls) => tls.connect(socket, member).await.map(Stream::Layered),
        }
    })
    .await
}

/// Passes a cancel on to the member that gave out the key.
pub async fn cancel_remote(
    member: &MemberName,
    place: &Place,
    header: &Header,
    tls: Option<&Arc<dyn TlsConnector>>,
    key: &[u8],
) -> io::Result<()> {
    within(CANCEL, async {
        let mut stream = remote(member, place, header, tls).await?;
        send_cancel(&mut stream, key).await
    })
    .await
}

async fn send_cancel(socket: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), key: &[u8]) -> io::Result<()> {
    socket.write_all(&startup::cancel_request(key)).await?;
    // No answer comes; the end of the connection says that the signal was sent.
    let mut nothing = [0; 64];
    while socket.read(&mut nothing).await? > 0 {}
    Ok(())
}

async fn within<T>(span: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(span, work)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {span:?}"))))
}
