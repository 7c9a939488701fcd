//! The endpoint's edges over a fake PostgreSQL: bytes, SQLSTATEs, who is closed when.

mod fences;
mod flow;
mod opening;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes};
use pgvigil::config::{EndpointConfig, Listen, Network};
use pgvigil::core::route::{EndpointPorts, Place, Reader, Route, Routing};
use pgvigil::core::{MemberName, Moment, Term};
use pgvigil::endpoint::count::Counters;
use pgvigil::endpoint::front::door::{Door, DoorSettings};
use pgvigil::endpoint::front::listen::{Listeners, Threads};
use pgvigil::endpoint::front::routes::{ReadPolicy, Routes};
use pgvigil::endpoint::gate::backend::Local;
use pgvigil::endpoint::gate::barrier::{Barrier, NoBarrier, Passing};
use pgvigil::endpoint::hooks::{Hooks, Identity, Ledger, PassThrough, Permit, Refusal};
use pgvigil::endpoint::wire::message::message;
use pgvigil::guardian::now;
use pgvigil::guardian::page::{Deadline, Page};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);
/// What must not come is waited for so long: a mistake shows as bytes that come too early, never as a slow test.
const QUIET: Duration = Duration::from_millis(150);
const SECOND: u64 = 1_000_000_000;
/// PostgreSQL's port in the fake's socket name.
const PORT: u16 = 5432;
const BACKEND_KEY: [u8; 8] = *b"\0\0\x12\x34key!";

/// Whole endpoint but for its agent: listeners, threads, door, routes.
struct Endpoint {
    routes: Arc<Routes>,
    counters: Arc<Counters>,
    door: Door,
    ports: [u16; 2],
    end: CancellationToken,
    ledger: Arc<Spy>,
    fake: UnixListener,
    directory: tempfile::TempDir,
    _listeners: Listeners,
    _threads: Threads,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// Admits everybody and remembers whom.
#[derive(Default)]
struct Spy(Mutex<Vec<Identity>>);

#[async_trait]
impl Ledger for Spy {
    async fn admit(&self, who: &Identity) -> Result<Permit, Refusal> {
        self.0.lock().unwrap().push(who.clone());
        Ok(Permit::new(()))
    }
}

fn name(text: &str) -> MemberName {
    MemberName::new(text).unwrap()
}

/// Ports of this process: nextest gives each test one of its own, so the kernel is asked for free ones.
fn free_port() -> u16 {
    static LAST: AtomicU16 = AtomicU16::new(0);
    loop {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if LAST.swap(port, Ordering::SeqCst) != port {
            return port;
        }
    }
}

fn settings(directory: &Path) -> DoorSettings {
    DoorSettings {
        name: "node-a".to_owned(),
        member: Some(name("node-a")),
        local: Some(Local { socket_dir: directory.to_owned(), port: PORT }),
        reserved_roles: vec!["pgvigil".to_owned()],
        startup_timeout: PATIENCE,
        failover_hold: PATIENCE,
        read_policy: ReadPolicy { max_lag: 1000, fall_back: true },
        proxies: Vec::new(),
    }
}

impl Endpoint {
    fn start() -> Endpoint {
        Endpoint::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut DoorSettings)) -> Endpoint {
        let directory = tempfile::tempdir().unwrap();
        let fake = UnixListener::bind(directory.path().join(format!(".s.PGSQL.{PORT}"))).unwrap();
        let routes = Arc::new(Routes::default());
        let counters = Arc::new(Counters::default());
        let ledger = Arc::new(Spy::default());
        let mut settings = settings(directory.path());
        change(&mut settings);
        let hooks =
            Hooks { authenticator: Arc::new(PassThrough), ledger: ledger.clone(), tls: None, upstream_tls: None };
        let door = Door::new(routes.clone(), counters.clone(), settings, hooks);
        let ports = [free_port(), free_port()];
        let at = |port: u16| vec![Listen::At(SocketAddr::from(([127, 0, 0, 1], port)))];
        let config = EndpointConfig {
            listen: at(ports[0]),
            listen_read_only: at(ports[1]),
            socket_dir: None,
            direct: false,
            failover_hold: PATIENCE,
            max_lag: 1000,
            read_only_fallback: true,
            threads: 1,
            proxies: Vec::new(),
        };
        let listeners = Listeners::bind(&config).unwrap();
        let end = CancellationToken::new();
        let threads = Threads::start(&listeners, &door, 1, &end).unwrap();
        Endpoint {
            routes,
            counters,
            door,
            ports,
            end,
            ledger,
            fake,
            directory,
            _listeners: listeners,
            _threads: threads,
        }
    }

    /// The primary is here under term 4, for as long as the page says.
    fn leads(&self) -> Arc<Page> {
        let page = Arc::new(Page::create(1).unwrap().0);
        extend(&page, 60 * SECOND);
        self.routes.add_page(page.clone());
        self.routes.publish(routing(4, Route::Local { term: Term(4) }));
        page
    }

    fn barrier(&self, barrier: Arc<dyn Barrier>) {
        let settings = settings(self.directory.path());
        let hooks =
            Hooks { authenticator: Arc::new(PassThrough), ledger: self.ledger.clone(), tls: None, upstream_tls: None };
        self.door.replace(settings, hooks, barrier);
    }

    async fn client(&self) -> Peer {
        Peer::of(TcpStream::connect(("127.0.0.1", self.ports[0])).await.unwrap())
    }

    /// The fake's next connection.
    async fn backend(&self) -> Peer<UnixStream> {
        Peer::of(timeout(PATIENCE, self.fake.accept()).await.expect("nobody connected to PostgreSQL").unwrap().0)
    }

    /// Client and backend of a session that is ready for queries, with the client's cancel key.
    async fn session(&self) -> (Peer, Peer<UnixStream>, Bytes) {
        let mut client = self.client().await;
        client.send(&startup(0, &[("user", "maas"), ("database", "maasdb")])).await;
        let mut backend = self.backend().await;
        backend.packet().await;
        let key = log_in(&mut client, &mut backend).await;
        (client, backend, key)
    }
}

/// A SCRAM exchange as far as a proxy sees it, and the greeting.
async fn log_in(client: &mut Peer, backend: &mut Peer<UnixStream>) -> Bytes {
    backend.send(&authentication(10, b"SCRAM-SHA-256\0\0")).await;
    assert_eq!(client.message().await.0, b'R');
    client.send(&text(b'p', "SCRAM-SHA-256")).await;
    assert_eq!(backend.message().await.0, b'p');
    backend.send(&[authentication(12, b"v=x"), authentication(0, b"")].concat()).await;
    backend
        .send(&[text(b'S', "server_version\x0015"), message(b'K', |b| b.put_slice(&BACKEND_KEY)), ready(b'I')].concat())
        .await;
    let tags: Vec<(u8, Bytes)> = vec![
        client.message().await,
        client.message().await,
        client.message().await,
        client.message().await,
        client.message().await,
    ];
    assert_eq!(tags.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), b"RRSKZ");
    tags[3].1.clone()
}

fn extend(page: &Page, nanoseconds: u64) {
    page.write_deadline(Deadline { term: 4, at: now().plus(nanoseconds) });
}

fn moment() -> Moment {
    let clocks = now();
    Moment { raw: clocks.raw, monotonic: clocks.monotonic, boottime: clocks.boottime }
}

fn routing(term: u64, write: Route) -> Routing {
    Routing {
        term: Term(term),
        write,
        readers: Vec::new(),
        standby_here: false,
        sync: true,
        members: ["node-a", "node-b"].map(|member| (name(member), None)).into(),
        valid_until: moment().plus(Duration::from_secs(60)),
    }
}

fn nobody(term: u64) -> Routing {
    routing(term, Route::Refuse { sqlstate: "57P03".to_owned(), text: "electing".to_owned() })
}

// === Messages ===

fn startup(minor: u16, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u32(3 << 16 | u32::from(minor));
    for (key, value) in parameters {
        body.extend([key.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    body.push(0);
    packet(&body)
}

/// Untagged, with its length.
fn packet(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

fn request(code: u32, body: &[u8]) -> Vec<u8> {
    packet(&[&code.to_be_bytes(), body].concat())
}

const SSL: u32 = 80_877_103;
const GSSENC: u32 = 80_877_104;
const CANCEL: u32 = 80_877_102;

fn text(tag: u8, words: &str) -> Bytes {
    message(tag, |body| {
        body.put_slice(words.as_bytes());
        body.put_u8(0);
    })
}

fn ready(status: u8) -> Bytes {
    message(b'Z', |body| body.put_u8(status))
}

fn complete(tag: &str) -> Bytes {
    text(b'C', tag)
}

fn query(sql: &str) -> Bytes {
    text(b'Q', sql)
}

fn authentication(kind: u32, rest: &[u8]) -> Bytes {
    message(b'R', |body| {
        body.put_u32(kind);
        body.put_slice(rest);
    })
}

fn error(code: &str) -> Bytes {
    message(b'E', |body| body.put_slice(format!("SFATAL\0C{code}\0Mno\0\0").as_bytes()))
}

fn sqlstate(body: &[u8]) -> String {
    String::from_utf8_lossy(pgvigil::endpoint::wire::message::field(body, b'C').unwrap_or_default()).into_owned()
}

// === Peers ===

/// One end of a connection; every wait on it is bounded.
struct Peer<S = TcpStream> {
    stream: S,
}

impl<S: AsyncReadExt + AsyncWriteExt + Unpin> Peer<S> {
    fn of(stream: S) -> Peer<S> {
        Peer { stream }
    }

    async fn send(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.stream.write_all(bytes)).await.expect("nobody reads").unwrap();
    }

    async fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        timeout(PATIENCE, self.stream.read_exact(&mut bytes)).await.expect("nothing came").expect("closed");
        bytes
    }

    async fn message(&mut self) -> (u8, Bytes) {
        let head = self.read(5).await;
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        (head[0], self.read(length - 4).await.into())
    }

    /// A packet without a tag: what a server gets first.
    async fn packet(&mut self) -> Vec<u8> {
        let head = self.read(4).await;
        let length = u32::from_be_bytes(head[..].try_into().unwrap()) as usize;
        self.read(length - 4).await
    }

    /// Refused: FATAL with this SQLSTATE, then the end.
    async fn refused(&mut self, code: &str) -> Bytes {
        let (tag, body) = self.message().await;
        assert_eq!((tag, sqlstate(&body).as_str()), (b'E', code), "{}", String::from_utf8_lossy(&body));
        self.closed().await;
        body
    }

    /// Nothing more comes, and the connection ends; an error is an end too.
    async fn closed(&mut self) {
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("still open");
        assert_eq!((read.ok().filter(|count| *count > 0), String::from_utf8_lossy(&rest).as_ref()), (None, ""));
    }

    async fn quiet(&mut self) {
        let mut byte = [0];
        let read = timeout(QUIET, self.stream.read(&mut byte)).await;
        assert!(read.is_err(), "came: {read:?} {byte:?}");
    }
}

/// A barrier that returns when the test says so.
#[derive(Clone)]
struct ByHand {
    results: tokio::sync::watch::Sender<Option<Result<(), String>>>,
    asked: Arc<AtomicU16>,
}

impl ByHand {
    fn new() -> ByHand {
        ByHand { results: tokio::sync::watch::Sender::new(None), asked: Arc::default() }
    }

    fn returns(&self, result: Result<(), &str>) {
        self.results.send_replace(Some(result.map_err(str::to_owned)));
    }

    fn asked(&self) -> u16 {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Barrier for ByHand {
    fn pass(&self) -> Passing {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut results = self.results.subscribe();
        Box::pin(async move {
            let result = results.wait_for(Option::is_some).await.map_err(|e| e.to_string())?;
            result.clone().unwrap_or_else(|| Err("none".to_owned()))
        })
    }
}
