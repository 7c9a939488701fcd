//! Sockets that clients come to, and the threads that serve them.
//!
//! Each data thread has a runtime of its own and accepts from every listener; a session stays on the thread that accepted
//! it. A full table of descriptors or a storm of connections costs nobody who is in already.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::door::{Door, enter};
use crate::config::{EndpointConfig, Listen};
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::proxy::Port;

/// Connections that have not shown yet what they want; above it newcomers wait in the kernel's queue.
const STRANGERS: usize = 1024;
/// After an accept that failed (no descriptors left, usually).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BACKLOG: i32 = 1024;

/// Bound sockets; closed when dropped.
pub struct Listeners {
    tcp: Vec<(Port, std::net::TcpListener)>,
    unix: Vec<(Port, std::os::unix::net::UnixListener)>,
    files: Vec<PathBuf>,
}

impl Listeners {
    /// All addresses of the settings, or the first that cannot be had.
    pub fn bind(config: &EndpointConfig) -> io::Result<Listeners> {
        let mut listeners = Listeners { tcp: Vec::new(), unix: Vec::new(), files: Vec::new() };
        for (port, all) in [(Port::ReadWrite, &config.listen), (Port::ReadOnly, &config.listen_read_only)] {
            for one in all {
                for socket in addresses(*one) {
                    listeners.tcp.push((port, socket.map_err(|e| named(&format!("listen on {one:?}"), e))?));
                }
                if let Some(directory) = &config.socket_dir {
                    let path = directory.join(format!(".s.PGSQL.{}", one.port()));
                    if listeners.files.contains(&path) {
                        continue;
                    }
                    let socket = bind_unix(&path).map_err(|e| named(&format!("listen on {}", path.display()), e))?;
                    listeners.unix.push((port, socket));
                    listeners.files.push(path);
                }
            }
        }
        Ok(listeners)
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for path in &self.files {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn named(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn addresses(listen: Listen) -> Vec<io::Result<std::net::TcpListener>> {
    match listen {
        Listen::At(address) => vec![bind_tcp(address)],
        Listen::Everywhere(port) => {
            let four = bind_tcp((Ipv4Addr::UNSPECIFIED, port).into());
            match bind_tcp((Ipv6Addr::UNSPECIFIED, port).into()) {
                // A machine without IPv6 has no such addresses to listen on.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => vec![four],
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => vec![four],
                six => vec![four, six],
            }
        }
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // Or the wildcard would take IPv4's place too.
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    // Left behind by one that was killed; a living one holds the port beside it, which was bound before.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    // As PostgreSQL's own: who may log in is said by passwords.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Threads that run until the token is cancelled.
pub struct Threads {
    handles: Vec<std::thread::JoinHandle<()>>,
}

impl Threads {
    pub fn start(listeners: &Listeners, door: &Door, count: usize, end: &CancellationToken) -> io::Result<Threads> {
        let mut handles = Vec::with_capacity(count);
        for number in 0..count {
            let copies = Listeners {
                tcp: listeners.tcp.iter().map(|(p, l)| Ok((*p, l.try_clone()?))).collect::<io::Result<_>>()?,
                unix: listeners.unix.iter().map(|(p, l)| Ok((*p, l.try_clone()?))).collect::<io::Result<_>>()?,
                files: Vec::new(),
            };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (door, end) = (door.clone(), end.clone());
            let run = move || runtime.block_on(serve(copies, door, end));
            handles.push(std::thread::Builder::new().name(format!("data-{number}")).spawn(run)?);
        }
        Ok(Threads { handles })
    }

    pub fn join(self) {
        for handle in self.handles {
            if handle.join().is_err() {
                error!("a data thread panicked");
            }
        }
    }
}

/// Sessions are tasks of this runtime and end with it.
async fn serve(mut listeners: Listeners, door: Door, end: CancellationToken) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let mut accepting = tokio::task::JoinSet::new();
    for (port, listener) in std::mem::take(&mut listeners.tcp) {
        let (door, strangers) = (door.clone(), strangers.clone());
        match TcpListener::from_std(listener) {
            Ok(listener) => drop(accepting.spawn(accept_tcp(listener, port, door, strangers))),
            Err(error) => error!(%error, "a listener cannot be used"),
        }
    }
    for (port, listener) in std::mem::take(&mut listeners.unix) {
        let (door, strangers) = (door.clone(), strangers.clone());
        match UnixListener::from_std(listener) {
            Ok(listener) => drop(accepting.spawn(accept_unix(listener, port, door, strangers))),
            Err(error) => error!(%error, "a listener cannot be used"),
        }
    }
    end.cancelled().await;
}

async fn accept_tcp(listener: TcpListener, port: Port, door: Door, strangers: Arc<Semaphore>) {
    let mut failing = false;
    loop {
        let Ok(place) = strangers.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, address)) => {
                failing = false;
                tokio::spawn(enter(door.clone(), Stream::tcp(socket), Some(address), port, place));
            }
            Err(error) => pause(&mut failing, &error).await,
        }
    }
}

async fn accept_unix(listener: UnixListener, port: Port, door: Door, strangers: Arc<Semaphore>) {
    let mut failing = false;
    loop {
        let Ok(place) = strangers.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, _)) => {
                failing = false;
                tokio::spawn(enter(door.clone(), Stream::Unix(socket), None, port, place));
            }
            Err(error) => pause(&mut failing, &error).await,
        }
    }
}

/// One line when accepting begins to fail, not twenty a second.
async fn pause(failing: &mut bool, error: &io::Error) {
    if *failing {
        debug!(%error, "accept a connection");
    } else {
        warn!(%error, "accept a connection; next try in {ACCEPT_PAUSE:?}");
    }
    *failing = true;
    tokio::time::sleep(ACCEPT_PAUSE).await;
}
