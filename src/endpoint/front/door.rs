//! One connection from its first byte to its last: opened, authenticated, admitted, connected, relayed, ended.
//!
//! ```text
//! opener ─► authenticator ─► way and place ─► backend ─► exchange ─► greeting ─► relay ─► end
//!                              │ no primary: waits, failover_hold, then 57P03
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info};

use super::exchange::{Ends, Failure, Ready};
use super::opener::{self, Opened, Wish};
use super::routes::{Closed, ReadPolicy, Routes, To, Way};
use crate::config::Network;
use crate::core::Moment;
use crate::core::names::MemberName;
use crate::core::route::Place;
use crate::endpoint::count::{Counters, Gauge};
use crate::endpoint::gate::backend::{self, Local};
use crate::endpoint::gate::barrier::{Barrier, NoBarrier};
use crate::endpoint::gate::cancel::{Entry, Keys, Target};
use crate::endpoint::hooks::{Hello, Hooks, Identity, Peer, Permit, Proof, Refusal};
use crate::endpoint::session::relay::{End, Parts, Relay};
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::key;
use crate::endpoint::wire::proxy::{Header, Port};
use crate::endpoint::wire::startup::Replication;
use crate::guardian::now;

/// PostgreSQL's own authentication_timeout: people type passwords.
const AUTHENTICATION: Duration = Duration::from_secs(60);
/// A last word that nobody takes is not waited for.
const LAST_WORD: Duration = Duration::from_secs(1);
/// PostgreSQL that refuses connections (starting, stopping) tells nobody when it stops refusing.
const RETRY: Duration = Duration::from_millis(50);

/// What the door acts by; replaced as a whole when the agent says something new.
#[derive(Clone, Debug)]
pub struct DoorSettings {
    /// How this front is called towards gates.
    pub name: String,
    pub member: Option<MemberName>,
    /// PostgreSQL of this host; a router has none.
    pub local: Option<Local>,
    /// Roles that are pgvigil's own.
    pub reserved_roles: Vec<String>,
    /// For a client to say what it wants: it has nothing to think about.
    pub startup_timeout: Duration,
    pub failover_hold: Duration,
    pub read_policy: ReadPolicy,
    /// Whose PROXY headers are believed.
    pub proxies: Vec<Network>,
}

#[derive(Clone)]
pub struct Door(Arc<Inner>);

struct Inner {
    routes: Arc<Routes>,
    keys: Keys,
    counters: Arc<Counters>,
    // Replaced on the control thread, read once for each connection.
    state: RwLock<State>,
}

#[derive(Clone)]
struct State {
    settings: Arc<DoorSettings>,
    hooks: Hooks,
    barrier: Arc<dyn Barrier>,
}

impl Door {
    pub fn new(routes: Arc<Routes>, counters: Arc<Counters>, settings: DoorSettings, hooks: Hooks) -> Door {
        let state = State { settings: Arc::new(settings), hooks, barrier: Arc::new(NoBarrier) };
        Door(Arc::new(Inner { routes, keys: Keys::default(), counters, state: RwLock::new(state) }))
    }

    pub fn replace(&self, settings: DoorSettings, hooks: Hooks, barrier: Arc<dyn Barrier>) {
        let state = State { settings: Arc::new(settings), hooks, barrier };
        *self.0.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn state(&self) -> State {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn hooks(&self) -> Hooks {
        self.state().hooks
    }

    pub fn trusts(&self, address: IpAddr) -> bool {
        self.state().settings.proxies.iter().any(|network| network.contains(address))
    }
}

/// A connection that was just accepted. `place`: its place among those that have not shown yet what they want.
pub async fn enter(door: Door, stream: Stream, address: Option<SocketAddr>, port: Port, place: OwnedSemaphorePermit) {
    let counters = door.0.counters.clone();
    Counters::one(&counters.accepted);
    let _connection = counters.hold(Gauge::Connections);
    // A client that says nothing within the time is closed without a word, as PostgreSQL does.
    let Ok(opened) = timeout(door.state().settings.startup_timeout, opener::open(&door, stream, address, port)).await
    else {
        return;
    };
    match opened {
        Err(failed) => {
            Counters::one(&counters.refused);
            if let Some(stream) = failed.stream {
                refuse(stream, &failed.refusal).await;
            }
        }
        Ok(Opened { wish: Wish::Nothing, .. }) => {}
        Ok(Opened { stream, wish: Wish::Cancel { key, peer }, .. }) => {
            pass_cancel(&door, &key, &peer).await;
            drop(stream);
        }
        Ok(Opened { stream, wish: Wish::Session(hello), rest }) => {
            let state = door.state();
            let mut visit = Visit { door, state, hello: *hello, client: stream, rest };
            match visit.prepare(place).await {
                Ok(session) => session.run(visit).await,
                Err(Failure::Refused(refusal)) => {
                    debug!(sqlstate = refusal.sqlstate, message = refusal.message, "refused");
                    Counters::one(&counters.refused);
                    refuse(visit.client, &refusal).await;
                }
                Err(Failure::Over | Failure::NotNow(_)) => {}
            }
        }
    }
}

async fn refuse(mut stream: Stream, refusal: &Refusal) {
    let told = async {
        stream.write_all(&refusal.to_bytes()).await?;
        stream.shutdown().await
    };
    // A client that left already needs no reason.
    let _ = timeout(LAST_WORD, told).await;
}

/// A client on its way in.
struct Visit {
    door: Door,
    state: State,
    hello: Hello,
    client: Stream,
    rest: BytesMut,
}

/// Everything that lives as long as a session; dropped together.
struct Session {
    backend: Stream,
    way: Way,
    target: Arc<Target>,
    ready: Ready,
    _entry: Option<Entry>,
    _permit: Option<Permit>,
}

impl Visit {
    async fn prepare(&mut self, place: OwnedSemaphorePermit) -> Result<Session, Failure> {
        self.check().map_err(Failure::Refused)?;
        let authenticator = self.state.hooks.authenticator.clone();
        let proof = timeout(AUTHENTICATION, authenticator.authenticate(&mut self.client, &self.hello))
            .await
            .map_err(|_| Failure::Over)?
            .map_err(Failure::Refused)?;
        drop(place);
        let identity = match &proof {
            Proof::PassThrough => self.hello.claimed(),
            Proof::Proven { identity, .. } => identity.clone(),
        };
        let _waiting = self.door.0.counters.hold(Gauge::Waiting);
        let until = Instant::now() + self.state.settings.failover_hold;
        loop {
            let way = self.way(until).await?;
            let permit = self.admit(&way, &identity).await?;
            if way.opening.is_shut() {
                continue;
            }
            match self.connect(way, permit, &proof).await {
                Err(Failure::NotNow(why)) => {
                    debug!(why, "PostgreSQL takes nobody now");
                    self.pause(until, &why).await?;
                }
                other => return other,
            }
        }
    }

    fn check(&self) -> Result<(), Refusal> {
        let user = self.hello.startup.user();
        if self.state.settings.reserved_roles.contains(&user) {
            return Err(
                Refusal::new("28000", format!("role \"{user}\" is pgvigil's own")).hint("Connect as a role of yours.")
            );
        }
        match self.hello.startup.replication() {
            Replication::None => Ok(()),
            Replication::Physical | Replication::Logical => {
                Err(Refusal::new("0A000", "replication connections do not go through the endpoint")
                    .hint("Connect to PostgreSQL's own port."))
            }
        }
    }

    /// Waits for a way, as long as new connections may wait for a primary.
    async fn way(&self, until: Instant) -> Result<Way, Failure> {
        let peer = &self.hello.peer;
        let policy = self.state.settings.read_policy;
        let mut changes = self.door.0.routes.changes();
        loop {
            changes.mark_unchanged();
            let closed = match self.door.0.routes.way(peer.port, peer.hop, policy, moment()) {
                Ok(way) => return Ok(way),
                Err(closed) => closed,
            };
            // A front asks again by itself, and may know better where to go by then.
            if peer.hop {
                return Err(Failure::Refused(not_now(&closed, Duration::ZERO)));
            }
            tokio::select! {
                changed = timeout_at(until, changes.changed()) => if changed.is_err() {
                    return Err(Failure::Refused(not_now(&closed, self.state.settings.failover_hold)));
                },
                () = self.client.gone() => return Err(Failure::Over),
            }
        }
    }

    /// One ledger, at the gate: who is passed on is counted there.
    async fn admit(&self, way: &Way, identity: &Identity) -> Result<Option<Permit>, Failure> {
        if way.to != To::Here {
            return Ok(None);
        }
        tokio::select! {
            admitted = self.state.hooks.ledger.admit(identity) => admitted.map(Some).map_err(Failure::Refused),
            () = self.client.gone() => Err(Failure::Over),
        }
    }

    async fn pause(&self, until: Instant, why: &str) -> Result<(), Failure> {
        if Instant::now() + RETRY >= until || self.hello.peer.hop {
            let closed = Closed { sqlstate: "57P03", text: why.to_owned() };
            return Err(Failure::Refused(not_now(&closed, self.state.settings.failover_hold)));
        }
        let mut changes = self.door.0.routes.changes();
        changes.mark_unchanged();
        tokio::select! {
            _ = timeout(RETRY, changes.changed()) => Ok(()),
            () = self.client.gone() => Err(Failure::Over),
        }
    }

    async fn connect(&mut self, way: Way, permit: Option<Permit>, proof: &Proof) -> Result<Session, Failure> {
        let not_now = |error: std::io::Error| Failure::NotNow(format!("connect to PostgreSQL: {error}"));
        let mut backend = match &way.to {
            To::Here => match &self.state.settings.local {
                Some(local) => local.connect().await.map_err(not_now)?,
                None => return Err(Failure::NotNow("there is no PostgreSQL on this host".to_owned())),
            },
            To::Member { member, place } => {
                let header = self.header();
                backend::remote(member, place, &header, self.state.hooks.upstream_tls.as_ref())
                    .await
                    .map_err(not_now)?
            }
        };
        let through_tls = self.hello.tls.is_some();
        let target = Arc::new(Target::default());
        let mut entry = None;
        let exchange = async {
            let from_backend = match proof {
                Proof::Proven { login, .. } => {
                    login.log_in(&mut backend, &self.hello.startup).await.map_err(Failure::Refused)?
                }
                Proof::PassThrough => BytesMut::new(),
            };
            let mut ends = Ends {
                client: &mut self.client,
                backend: &mut backend,
                from_client: std::mem::take(&mut self.rest),
                from_backend,
            };
            if matches!(proof, Proof::PassThrough) {
                ends.authenticate(&self.hello.startup, through_tls).await?;
            }
            ends.greet(|backend_key| match &way.to {
                // The gate over there gave out a key of its own, which names it.
                To::Member { .. } => {
                    target.set_key(backend_key.clone());
                    Ok(backend_key)
                }
                To::Here => {
                    target.set_key(backend_key.clone());
                    let (key, place) = self.door.new_key(&backend_key, &target)?;
                    entry = Some(place);
                    Ok(key)
                }
            })
            .await
        };
        let mut phase = way.opening.phase();
        let exchanged = tokio::select! {
            exchanged = timeout(AUTHENTICATION, exchange) => exchanged.map_err(|_| Failure::Over),
            // A term that ends while somebody logs in: nothing more is said under it.
            () = async { while !way.opening.is_shut() { if phase.changed().await.is_err() { return } } } => Err(Failure::Over),
        };
        let ready = exchanged??;
        Ok(Session { backend, way, target, ready, _entry: entry, _permit: permit })
    }

    fn header(&self) -> Header {
        let peer = &self.hello.peer;
        // The client's own port means nothing to the budget.
        let client = peer.address.map(|address| SocketAddr::new(address, 0));
        let identity = self.hello.claimed().certificate;
        let via = peer.via.clone().unwrap_or_else(|| self.state.settings.name.clone());
        Header { client, port: Some(peer.port), via: Some(via), identity }
    }
}

fn not_now(closed: &Closed, waited: Duration) -> Refusal {
    let refusal = Refusal::new(closed.sqlstate, format!("cannot connect now: {}", closed.text));
    if waited.is_zero() { refusal } else { refusal.detail(format!("Waited {} s for a primary.", waited.as_secs())) }
}

fn moment() -> Moment {
    let clocks = now();
    Moment { raw: clocks.raw, monotonic: clocks.monotonic, boottime: clocks.boottime }
}

// === A session ===

impl Session {
    async fn run(self, visit: Visit) {
        let counters = visit.door.0.counters.clone();
        let which = if visit.hello.peer.port == Port::ReadWrite { Gauge::Sessions } else { Gauge::Readers };
        let _counted = counters.hold(which);
        let parts = Parts {
            client: visit.client,
            backend: self.backend,
            from_client: self.ready.from_client.to_vec(),
            from_backend: self.ready.from_backend.to_vec(),
            opening: self.way.opening.clone(),
            target: self.target.clone(),
            barrier: visit.state.barrier.clone(),
            counters: counters.clone(),
            edge: self.way.edge,
        };
        let mut relay = match Relay::new(parts) {
            Ok(relay) => relay,
            Err(end) => {
                debug!(?end, "a session ended before it began");
                return;
            }
        };
        let end = relay.run().await;
        debug!(?end, user = visit.hello.startup.user(), "a session ended");
        match end {
            End::Client { busy } => {
                if busy && !self.target.is_idle() {
                    // Nobody waits for its answer, and its locks stand in others' way.
                    cancel_own(&visit.state, &self.way, &self.target).await;
                }
                leave(&mut relay).await;
            }
            End::Server => {
                let _ = timeout(LAST_WORD, relay.client.shutdown()).await;
            }
            End::Shut => {
                Counters::one(&counters.cut);
                // What the kernel still holds for the client is thrown away with the connection (S4).
                relay.client.reset_on_close();
            }
            End::Unknown(why) => {
                Counters::one(&counters.unknown);
                info!(why, user = visit.hello.startup.user(), "the outcome of a transaction is not known (08007)");
                let refusal = Refusal::new("08007", "the outcome of the transaction is not known")
                    .detail(why)
                    .hint("Find out whether it is there before trying it again.");
                if relay.may_speak() {
                    let _ = timeout(LAST_WORD, relay.client.write_all(&refusal.to_bytes())).await;
                    let _ = timeout(LAST_WORD, relay.client.shutdown()).await;
                } else {
                    relay.client.reset_on_close();
                }
                leave(&mut relay).await;
            }
            End::ClientViolation(why) => {
                Counters::one(&counters.refused);
                if relay.may_speak() {
                    let _ = timeout(LAST_WORD, relay.client.write_all(&Refusal::violation(why).to_bytes())).await;
                    let _ = timeout(LAST_WORD, relay.client.shutdown()).await;
                }
            }
            End::ServerViolation(why) => {
                info!(why, "PostgreSQL sent what cannot be read; the session is closed");
                relay.client.reset_on_close();
            }
        }
    }
}

/// Terminate, where the stream stands between two messages; else the closed socket has to say it.
async fn leave(relay: &mut Relay) {
    if relay.backend_boundary() {
        let _ = timeout(LAST_WORD, relay.backend.write_all(b"X\0\0\0\x04")).await;
    }
}

// === Cancels ===

impl Door {
    /// A key that no other session has, and its place in the table.
    fn new_key(&self, backend_key: &[u8], target: &Arc<Target>) -> Result<(Bytes, Entry), Refusal> {
        let state = self.state();
        let routing = self.0.routes.changes().borrow().clone();
        let me = state.settings.member.as_ref();
        let node = routing.and_then(|routing| routing.members.keys().position(|name| Some(name) == me)).unwrap_or(0);
        // Longer keys exist from protocol 3.2 on.
        let minor = if backend_key.len() > 8 { 2 } else { 0 };
        // Fifty-eight random bits: a second try is a curiosity, a third one a broken source of randomness.
        for _ in 0..3 {
            let key = key::make(node as u8, minor)
                .map_err(|error| Refusal::new("58000", format!("make a cancel key: {error}")))?;
            if let Some(entry) = self.0.keys.insert(key.clone(), target.clone()) {
                return Ok((key, entry));
            }
        }
        Err(Refusal::new("58000", "no free cancel key"))
    }

    fn place_of(&self, key: &[u8]) -> Option<(MemberName, Place)> {
        let node = usize::from(key::node(key)?);
        let routing = self.0.routes.changes().borrow().clone()?;
        let (name, place) = routing.members.iter().nth(node)?;
        let own = self.state().settings.member.as_ref() == Some(name);
        (!own).then_some((name.clone(), place.clone()?))
    }
}

/// No answer is due, whatever comes of it: who does not have the key learns nothing.
async fn pass_cancel(door: &Door, key: &[u8], peer: &Peer) {
    Counters::one(&door.0.counters.cancels);
    let state = door.state();
    if let Some(target) = door.0.keys.find(key) {
        if target.is_idle() {
            return;
        }
        if let Some(local) = &state.settings.local {
            cancel_here(local, &target).await;
        }
        return;
    }
    if peer.hop {
        return;
    }
    if let Some((member, place)) = door.place_of(key) {
        let header = Header {
            client: peer.address.map(|address| SocketAddr::new(address, 0)),
            port: Some(peer.port),
            via: Some(state.settings.name.clone()),
            identity: None,
        };
        let passed = backend::cancel_remote(&member, &place, &header, state.hooks.upstream_tls.as_ref(), key).await;
        if let Err(error) = passed {
            debug!(%error, %member, "pass a cancel on");
        }
    }
}

async fn cancel_own(state: &State, way: &Way, target: &Arc<Target>) {
    match (&way.to, &state.settings.local) {
        (To::Here, Some(local)) => cancel_here(local, target).await,
        // The gate over there sees the end of this connection and does it.
        (To::Here, None) | (To::Member { .. }, _) => {}
    }
}

async fn cancel_here(local: &Local, target: &Arc<Target>) {
    let key = target.key();
    if key.is_empty() {
        return;
    }
    let cancelling = target.cancelling();
    match local.cancel(&key).await {
        Ok(()) => cancelling.done(),
        Err(error) => debug!(%error, "pass a cancel to PostgreSQL"),
    }
}
