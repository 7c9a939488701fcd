//! What an agent and its endpoint say to each other: one JSON document a packet over a SOCK_SEQPACKET socket that belongs
//! to the agent's user alone. A descriptor may come with a packet (the guardian's page).

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, sendmsg,
    socket,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::config::EndpointConfig;
use crate::core::endpoint::Report;
use crate::core::names::MemberName;
use crate::core::route::Routing;
use crate::guardian::receive_with_descriptor;

/// Who speaks another version is not understood; an agent then starts an endpoint of its own version.
pub const VERSION: u32 = 1;
/// Settings and routings have a few kilobytes.
const LONGEST: usize = 64 * 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub enum ToEndpoint {
    Hello {
        words: u32,
        version: String,
    },
    Settings(Box<Settings>),
    Routing(Box<Routing>),
    /// The page's descriptor comes with it.
    Page {
        nonce: u64,
    },
    /// Close everything and end.
    End,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub enum ToAgent {
    Hello { words: u32, version: String, pid: u32, sessions: u64 },
    Report(Box<Report>),
}

/// Everything that the endpoint has to know of its member; it reads no file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub member: MemberName,
    pub endpoint: EndpointConfig,
    /// Where PostgreSQL's unix socket is.
    pub socket_dir: PathBuf,
    pub port: u16,
    /// The agent's own role, for barriers.
    pub role: String,
    pub password: String,
    /// Roles that nobody uses through the endpoint.
    pub reserved_roles: Vec<String>,
    /// Places of PostgreSQL that clients may take.
    pub capacity: usize,
    /// Addresses of the members, which are fronts too.
    pub members: Vec<String>,
}

pub struct Line(AsyncFd<OwnedFd>);

impl Line {
    pub fn connect(path: &Path) -> io::Result<Line> {
        let socket = new_socket()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Line::of(socket)
    }

    #[allow(deprecated, reason = "its successor is unsafe; what that asks for is what OwnedFd guarantees")]
    fn of(socket: OwnedFd) -> io::Result<Line> {
        Ok(Line(AsyncFd::new(socket)?))
    }

    pub async fn say<T: Serialize>(&self, word: &T, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let text = serde_json::to_vec(word)?;
        if text.len() > LONGEST {
            return Err(io::Error::other(format!("a packet of {} bytes, more than {LONGEST}", text.len())));
        }
        let raw: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // A packet goes whole or not at all.
        self.0
            .async_io(Interest::WRITABLE, |socket| {
                sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, flags, None).map_err(io::Error::from)
            })
            .await
            .map(drop)
    }

    /// `None`: the other side has gone. Cancel-safe.
    pub async fn hear<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let mut buffer = vec![0; LONGEST];
        let receive = self.0.async_io(Interest::READABLE, |socket| receive_with_descriptor(socket, &mut buffer));
        let (length, descriptor) = match receive.await {
            Ok((0, _)) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        Ok(Some((serde_json::from_slice(&buffer[..length])?, descriptor)))
    }
}

pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// Refused when another endpoint listens there.
    pub fn bind(path: &Path) -> io::Result<Listener> {
        if Line::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another endpoint listens there"));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = new_socket()?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        listen(&socket, Backlog::new(8)?)?;
        #[allow(deprecated, reason = "its successor is unsafe; what that asks for is what OwnedFd guarantees")]
        let socket = AsyncFd::new(socket)?;
        Ok(Listener { socket, path: path.to_owned() })
    }

    /// Cancel-safe.
    pub async fn accept(&self) -> io::Result<Line> {
        let accept = |socket: &OwnedFd| {
            // std's listener, because it gives a descriptor that somebody owns; it does not care for the socket's type.
            let (stream, _) = std::os::unix::net::UnixListener::from(socket.try_clone()?).accept()?;
            stream.set_nonblocking(true)?;
            Ok(OwnedFd::from(stream))
        };
        Line::of(self.socket.async_io(Interest::READABLE, accept).await?)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}
