//! A byte stream to a client or to PostgreSQL, and what can be done with its socket.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A peer that vanished without a word gives its place back after this: 10 s of silence, three probes 5 s apart.
const KEEPALIVE_IDLE: u32 = 10;
const KEEPALIVE_INTERVAL: u32 = 5;
const KEEPALIVE_COUNT: u32 = 3;
/// The same when bytes are under way that nobody acknowledges, where keepalive is silent. It also ends a client that lives
/// and takes nothing for so long while something waits for it, so it is not as short; without it that takes 15 minutes.
const USER_TIMEOUT: Duration = Duration::from_secs(120);

/// Something on top of a socket: TLS.
pub trait Layer: AsyncRead + AsyncWrite + Unpin + Send + Sync {
    /// The socket under it.
    fn socket(&self) -> Option<&TcpStream>;
}

pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Layered(Box<dyn Layer>),
}

impl Stream {
    /// Makes a TCP socket fit for sessions; a socket that refuses is used as it is.
    pub fn tcp(socket: TcpStream) -> Stream {
        let tuned = || -> nix::Result<()> {
            let fd = socket.as_fd();
            setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
            setsockopt(&fd, sockopt::KeepAlive, &true)?;
            setsockopt(&fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
            setsockopt(&fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
            setsockopt(&fd, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
            setsockopt(&fd, sockopt::TcpUserTimeout, &(USER_TIMEOUT.as_millis() as u32))
        };
        if let Err(error) = tuned() {
            tracing::debug!(%error, "set options of a socket");
        }
        Stream::Tcp(socket)
    }

    fn socket(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(socket) => Some(socket),
            Stream::Layered(layer) => layer.socket(),
            Stream::Unix(_) => None,
        }
    }

    pub fn is_layered(&self) -> bool {
        matches!(self, Stream::Layered(_))
    }

    /// From now on closing throws away what was not sent yet and resets the connection: the other side learns at once, and
    /// nothing of ours reaches it any more. (A unix socket's buffer is in the reader's hands already.)
    pub fn reset_on_close(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        if let Some(socket) = self.socket()
            && let Err(error) = setsockopt(&socket.as_fd(), sockopt::Linger, &linger)
        {
            tracing::debug!(%error, "set SO_LINGER");
        }
    }

    /// Returns when the other side has gone while nothing is read from it. Bytes that wait to be read hide it: then this
    /// waits for ever. Cancel-safe.
    pub async fn gone(&self) {
        let mut byte = [0];
        let peeked = match self {
            Stream::Tcp(socket) => socket.peek(&mut byte).await,
            Stream::Layered(layer) => match layer.socket() {
                Some(socket) => socket.peek(&mut byte).await,
                None => Ok(1),
            },
            Stream::Unix(socket) => peek_unix(socket, &mut byte).await,
        };
        if matches!(peeked, Ok(waiting) if waiting > 0) {
            std::future::pending::<()>().await;
        }
    }
}

async fn peek_unix(socket: &UnixStream, byte: &mut [u8; 1]) -> io::Result<usize> {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    loop {
        socket.readable().await?;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match socket
            .try_io(tokio::io::Interest::READABLE, || recv(socket.as_raw_fd(), byte, flags).map_err(io::Error::from))
        {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(socket) => Pin::new(socket).poll_read(cx, buffer),
            Stream::Unix(socket) => Pin::new(socket).poll_read(cx, buffer),
            Stream::Layered(layer) => Pin::new(layer).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Stream::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
            Stream::Layered(layer) => Pin::new(layer).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(socket) => Pin::new(socket).poll_flush(cx),
            Stream::Unix(socket) => Pin::new(socket).poll_flush(cx),
            Stream::Layered(layer) => Pin::new(layer).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Stream::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
            Stream::Layered(layer) => Pin::new(layer).poll_shutdown(cx),
        }
    }
}
