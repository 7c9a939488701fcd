//! Sockets: bounded in number, time and size, so that no stranger can keep a health check from being answered.
//!
//! A connection is idle until a request's head is complete and again after its answer. At the limit the newcomer gets the
//! place of an idle one: the oldest of the peer that has the most, so a thousand silent sockets of one host cost the others
//! nothing. When all are busy the newcomer is closed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::HttpBody;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{BoxError, Router};
use bytes::Bytes;
use futures_util::FutureExt;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, error, warn};

use super::auth::Peer;
use super::error::ApiError;
use super::operations::WAITERS_SHARE;
use super::requests::Recent;
use super::{Api, App, routes};
use crate::agent::status::Status;
use crate::core::view::View;

/// Largest request head. Balancers send a few hundred bytes; hyper's smallest limit is 8 KiB.
const LARGEST_HEAD: usize = 16 * 1024;
const MOST_HEADERS: usize = 64;
/// How long answers under way may take at the end. Whoever waits for an operation is answered at once.
const DRAIN: Duration = Duration::from_secs(2);
/// After an accept that failed (no descriptors left, usually): long enough not to spin, short enough for a health check.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown`, then lets answers under way end, but not for long.
pub async fn serve(api: Api, listener: TcpListener, shutdown: CancellationToken) {
    let table = Table::new(api.config.max_connections);
    let (reading, last_reading) = watch::channel(None);
    let remember = remember_readings(api.status.clone(), reading, shutdown.clone());
    let app = Arc::new(App {
        cluster: api.cluster,
        token: api.config.token,
        body_timeout: api.config.header_timeout,
        status: api.status,
        endpoint: api.endpoint,
        last_reading,
        requests: api.requests,
        answers: api.answers,
        recent: Recent::default(),
        waiters: Semaphore::new(api.config.max_connections.div_ceil(WAITERS_SHARE)),
        connections: table.counts.clone(),
        clock: api.clock,
        shutdown: shutdown.clone(),
    });
    let server = Server { router: routes::router(app), table, header_timeout: api.config.header_timeout, shutdown };
    // Both end with the token; dropping either loses nothing but sockets.
    tokio::join!(remember, server.run(listener));
}

/// Keeps the last view in which the store was readable.
async fn remember_readings(
    mut status: watch::Receiver<Option<Arc<Status>>>,
    reading: watch::Sender<Option<Arc<View>>>,
    shutdown: CancellationToken,
) {
    loop {
        let view = status.borrow_and_update().as_ref().map(|status| status.view.clone());
        if view.as_ref().is_some_and(|view| view.store.records().is_some()) {
            reading.send_replace(view);
        }
        // Both are cancel-safe; a sender that is gone will not come back, and what was read stays shown.
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
        }
    }
}

struct Server {
    router: Router,
    table: Table,
    header_timeout: Duration,
    shutdown: CancellationToken,
}

impl Server {
    async fn run(self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        // One line when accepting begins to fail, not twenty a second.
        let mut failing = false;
        loop {
            // accept() and join_next() are cancel-safe.
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                Some(ended) = connections.join_next() => report(ended),
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        failing = false;
                        match self.table.admit(peer.ip()) {
                            Some(place) => { connections.spawn(self.connection(stream, peer, place)); }
                            None => debug!(%peer, "connection closed: all others are busy"),
                        }
                    }
                    Err(why) => {
                        if !failing {
                            warn!(error = %why, "accept a connection; an idle one makes room, next try in {ACCEPT_PAUSE:?}");
                        }
                        failing = true;
                        self.table.evict_one();
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        let drained = async {
            while let Some(ended) = connections.join_next().await {
                report(ended);
            }
        };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            debug!("connections were cut at the end");
        }
        // Dropping the set aborts what is left.
    }

    /// One connection from its first byte to its end. Owns its place, so that the place is free again however it ends.
    fn connection(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        place: Place,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (router, shutdown, timeout) = (self.router.clone(), self.shutdown.clone(), self.header_timeout);
        async move {
            if let Err(why) = stream.set_nodelay(true) {
                debug!(%peer, error = %why, "set TCP_NODELAY");
            }
            let service = service_fn(|request| answer(router.clone(), request, peer, &place));
            let mut builder = http1::Builder::new();
            // The header timeout runs between requests too, so it is the keep-alive timeout as well.
            builder.timer(TokioTimer::new()).header_read_timeout(timeout);
            builder.max_buf_size(LARGEST_HEAD).max_headers(MOST_HEADERS);
            let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
            let mut ending = false;
            loop {
                tokio::select! {
                    ended = connection.as_mut() => {
                        if let Err(why) = ended {
                            // Balancers end their checks with RST, and strangers send anything: nobody has to act.
                            debug!(%peer, error = %why, "connection ended");
                        }
                        return;
                    }
                    () = place.evicted.cancelled() => return,
                    () = shutdown.cancelled(), if !ending => {
                        ending = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        }
    }
}

/// A panic in a handler costs one answer. (Where panics abort, it costs the process; the log says which request did it.)
async fn answer<B>(
    router: Router,
    mut request: hyper::Request<B>,
    peer: SocketAddr,
    place: &Place,
) -> Result<Response, Infallible>
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let _busy = place.busy();
    request.extensions_mut().insert(Peer(peer));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match AssertUnwindSafe(router.oneshot(request)).catch_unwind().await {
        Ok(answered) => answered,
        Err(_) => {
            error!(%peer, %method, path, "a handler panicked");
            let sorry =
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "a handler panicked", "the agent's log has more");
            Ok(sorry.into_response())
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(why) = ended {
        error!(error = %why, "a connection's task panicked");
    }
}

// === Places ===

/// Sums for `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Numbers {
    pub open: u64,
    pub requests: u64,
    pub evicted: u64,
    pub refused: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Counts(Arc<[AtomicU64; 4]>);

impl Counts {
    fn add(&self, which: usize) {
        self.0[which].fetch_add(1, Ordering::Relaxed);
    }

    pub fn numbers(&self) -> Numbers {
        let [open, requests, evicted, refused] = [0, 1, 2, 3].map(|n: usize| self.0[n].load(Ordering::Relaxed));
        Numbers { open, requests, evicted, refused }
    }
}

const OPEN: usize = 0;
const REQUESTS: usize = 1;
const EVICTED: usize = 2;
const REFUSED: usize = 3;

#[derive(Clone)]
struct Table {
    limit: usize,
    counts: Counts,
    // Held for a few look-ups, never across an await.
    entries: Arc<Mutex<Entries>>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    open: HashMap<u64, Entry>,
}

struct Entry {
    peer: IpAddr,
    /// When it last became idle, in the order of such events; `None` while a request is answered.
    idle_since: Option<u64>,
    evicted: CancellationToken,
}

/// A connection's place in the table; given back when dropped.
struct Place {
    id: u64,
    evicted: CancellationToken,
    table: Table,
}

struct Busy<'a>(&'a Place);

impl Table {
    fn new(limit: usize) -> Table {
        Table { limit: limit.max(1), counts: Counts::default(), entries: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, peer: IpAddr) -> Option<Place> {
        let mut entries = self.lock();
        if entries.open.len() >= self.limit {
            if !entries.evict() {
                self.counts.add(REFUSED);
                return None;
            }
            self.counts.add(EVICTED);
        }
        let id = entries.tick();
        let evicted = CancellationToken::new();
        let entry = Entry { peer: peer.to_canonical(), idle_since: Some(id), evicted: evicted.clone() };
        entries.open.insert(id, entry);
        self.show(&entries);
        Some(Place { id, evicted, table: self.clone() })
    }

    fn evict_one(&self) {
        let mut entries = self.lock();
        if entries.evict() {
            self.counts.add(EVICTED);
        }
        self.show(&entries);
    }

    fn show(&self, entries: &Entries) {
        self.counts.0[OPEN].store(entries.open.len() as u64, Ordering::Relaxed);
    }
}

impl Entries {
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Ends the longest idle connection of the peer that has the most idle ones. False: nobody is idle.
    fn evict(&mut self) -> bool {
        let mut idle: HashMap<IpAddr, usize> = HashMap::new();
        for entry in self.open.values().filter(|entry| entry.idle_since.is_some()) {
            *idle.entry(entry.peer).or_default() += 1;
        }
        let candidates = self.open.iter().filter_map(|(id, entry)| Some((*id, entry.idle_since?, idle[&entry.peer])));
        let victim = candidates.max_by_key(|(_, since, count)| (*count, std::cmp::Reverse(*since)));
        let Some(entry) = victim.and_then(|(id, ..)| self.open.remove(&id)) else {
            return false;
        };
        entry.evicted.cancel();
        true
    }
}

impl Place {
    fn busy(&self) -> Busy<'_> {
        self.table.counts.add(REQUESTS);
        if let Some(entry) = self.table.lock().open.get_mut(&self.id) {
            entry.idle_since = None;
        }
        Busy(self)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut entries = self.0.table.lock();
        let now = entries.tick();
        if let Some(entry) = entries.open.get_mut(&self.0.id) {
            entry.idle_since = Some(now);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut entries = self.table.lock();
        entries.open.remove(&self.id);
        self.table.show(&entries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_costs_one_answer() {
        let router = Router::new().route("/", axum::routing::get(async || -> &str { panic!("on purpose") }));
        let place = Table::new(1).admit(ip(1)).unwrap();
        let request = hyper::Request::builder().uri("/").body(axum::body::Body::empty()).unwrap();
        let answered = answer(router, request, SocketAddr::new(ip(1), 1), &place).await.unwrap();
        assert_eq!(answered.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(place.table.lock().open[&place.id].idle_since.is_some(), "the place is idle again");
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn the_oldest_idle_connection_of_the_greediest_peer_makes_room() {
        let table = Table::new(3);
        let polite = table.admit(ip(1)).unwrap();
        let first = table.admit(ip(2)).unwrap();
        let second = table.admit(ip(2)).unwrap();
        let newcomer = table.admit(ip(3)).unwrap();
        assert!(first.evicted.is_cancelled());
        assert!(![&polite, &second, &newcomer].iter().any(|place| place.evicted.is_cancelled()));
        // All three peers have one now: the one that is idle longest goes.
        let last = table.admit(ip(4)).unwrap();
        assert!(polite.evicted.is_cancelled());
        assert_eq!(table.counts.numbers(), Numbers { open: 3, requests: 0, evicted: 2, refused: 0 });
        drop((polite, first, second, newcomer, last));
        assert_eq!(table.counts.numbers().open, 0);
    }

    #[test]
    fn a_busy_connection_is_never_evicted() {
        let table = Table::new(2);
        let (one, two) = (table.admit(ip(1)).unwrap(), table.admit(ip(1)).unwrap());
        let busy = (one.busy(), two.busy());
        assert!(table.admit(ip(2)).is_none());
        drop(busy.0);
        assert!(table.admit(ip(2)).is_some());
        assert!(one.evicted.is_cancelled() && !two.evicted.is_cancelled());
        assert_eq!(table.counts.numbers().refused, 1);
    }
}
