//! `pgvigil endpoint`: the process beside the agent. It knows nothing until an agent tells it, and goes on with what it
//! was told when that agent dies.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::budget::Counting;
use super::control::{Control, Heard};
use super::count::Counters;
use super::front::door::{Door, DoorSettings};
use super::front::listen::{Listeners, Threads};
use super::front::routes::{ReadPolicy, Routes};
use super::gate::backend::Local;
use super::gate::barrier::{Barrier, Counts, Login, NoBarrier, PostgresBarrier};
use super::hooks::{Hooks, PassThrough};
use super::words::{Listener, Settings};
use crate::config::{EndpointConfig, LogConfig, Network, Secret};
use crate::core::endpoint::Report;

/// An address that is in use is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// From the first byte to the startup packet; PostgreSQL gives 60 s for that and the password together.
pub(super) const STARTUP: Duration = Duration::from_secs(10);

pub struct Options {
    /// Where the agent finds it.
    pub socket: PathBuf,
    pub log: LogConfig,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    crate::telemetry::init(&options.log)?;
    // One provider for the whole process (docs/decisions/0003); an error means that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Of nobody's session: the end of the agent's terminal is not ours. Refused where we lead one already.
    let _ = nix::unistd::setsid();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> anyhow::Result<()> {
    let listener =
        Listener::bind(&options.socket).with_context(|| format!("listen on {}", options.socket.display()))?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for signals")?;
    let mut endpoint = Endpoint::new();
    let mut control = Control::new(listener);
    info!(socket = %options.socket.display(), "endpoint started");
    let mut tick = tokio::time::interval(RETRY);
    loop {
        // All arms are cancel-safe.
        tokio::select! {
            heard = control.hear() => match heard {
                Heard::Settings(settings) => endpoint.apply(*settings),
                Heard::Routing(routing) => endpoint.routes.publish(*routing),
                Heard::Page(page) => endpoint.routes.add_page(Arc::new(page)),
                Heard::Agent => {}
                Heard::End => break,
            },
            _ = terminate.recv() => break,
            _ = tick.tick() => endpoint.listen(),
        }
        control.report(endpoint.report()).await;
    }
    info!("endpoint ends");
    endpoint.end();
    Ok(())
}

/// Everything that serves clients.
struct Endpoint {
    routes: Arc<Routes>,
    counters: Arc<Counters>,
    settings: Option<Settings>,
    door: Option<Door>,
    barrier: Option<Arc<Counts>>,
    serving: Option<Serving>,
    problem: Option<String>,
}

/// Dropping the listeners closes the ports, cancelling ends the sessions.
struct Serving {
    of: EndpointConfig,
    listeners: Listeners,
    threads: Threads,
    end: CancellationToken,
}

impl Endpoint {
    fn new() -> Endpoint {
        Endpoint {
            routes: Arc::default(),
            counters: Arc::default(),
            settings: None,
            door: None,
            barrier: None,
            serving: None,
            problem: None,
        }
    }

    /// What an agent says; the same again changes nothing.
    fn apply(&mut self, settings: Settings) {
        if self.settings.as_ref() == Some(&settings) {
            return;
        }
        let barrier = PostgresBarrier::start(Login {
            socket_dir: settings.socket_dir.clone(),
            port: settings.port,
            user: settings.role.clone(),
            password: Secret::new(settings.password.clone()),
        });
        self.barrier = Some(barrier.counts.clone());
        let barrier: Arc<dyn Barrier> = Arc::new(barrier);
        let hooks = hooks(settings.capacity);
        match &self.door {
            Some(door) => door.replace(door_settings(&settings), hooks, barrier),
            None => {
                let door =
                    Door::new(self.routes.clone(), self.counters.clone(), door_settings(&settings), hooks.clone());
                door.replace(door_settings(&settings), hooks, barrier);
                self.door = Some(door);
            }
        }
        self.settings = Some(settings);
        self.listen();
    }

    /// Has the ports that the settings ask for, or says why not.
    fn listen(&mut self) {
        let (Some(settings), Some(door)) = (&self.settings, &self.door) else { return };
        let wanted = &settings.endpoint;
        let sockets =
            |c: &EndpointConfig| (c.listen.clone(), c.listen_read_only.clone(), c.socket_dir.clone(), c.threads);
        if let Some(serving) = &self.serving {
            if sockets(&serving.of) == sockets(wanted) {
                return;
            }
            let sessions = self.counters.report().connections;
            warn!(connections = sessions, "other ports or threads are asked for: all connections are closed");
        }
        if let Some(serving) = self.serving.take() {
            serving.end();
        }
        match start(wanted, door) {
            Ok(serving) => {
                info!(listen = ?wanted.listen, read_only = ?wanted.listen_read_only, "listening for clients");
                self.serving = Some(serving);
                self.problem = None;
            }
            Err(error) => {
                let problem = error.to_string();
                if self.problem.as_ref() != Some(&problem) {
                    warn!(problem, "no port for clients; tried again every second");
                }
                self.problem = Some(problem);
            }
        }
    }

    fn report(&self) -> Report {
        use std::sync::atomic::Ordering::Relaxed;
        let barrier = |read: fn(&Counts) -> u64| self.barrier.as_deref().map(read).unwrap_or(0);
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            barriers: barrier(|counts| counts.returned.load(Relaxed)),
            barriers_failed: barrier(|counts| counts.failed.load(Relaxed)),
            problems: self.problem.iter().cloned().collect(),
            ..self.counters.report()
        }
    }

    fn end(mut self) {
        self.routes.shut_all();
        if let Some(serving) = self.serving.take() {
            serving.end();
        }
    }
}

impl Serving {
    fn end(self) {
        drop(self.listeners);
        self.end.cancel();
        self.threads.join();
    }
}

fn start(config: &EndpointConfig, door: &Door) -> std::io::Result<Serving> {
    let listeners = Listeners::bind(config)?;
    let end = CancellationToken::new();
    let threads = Threads::start(&listeners, door, config.threads, &end)?;
    Ok(Serving { of: config.clone(), listeners, threads, end })
}

/// Everything that a session asks others for: the one place where it is put together.
fn hooks(capacity: usize) -> Hooks {
    Hooks {
        authenticator: Arc::new(PassThrough),
        ledger: Arc::new(Counting::new(capacity)),
        tls: None,
        upstream_tls: None,
    }
}

fn door_settings(settings: &Settings) -> DoorSettings {
    let endpoint = &settings.endpoint;
    let mut proxies = endpoint.proxies.clone();
    proxies.extend(settings.members.iter().filter_map(|host| address_of(host)));
    DoorSettings {
        name: settings.member.to_string(),
        member: Some(settings.member.clone()),
        local: Some(Local { socket_dir: settings.socket_dir.clone(), port: settings.port }),
        reserved_roles: settings.reserved_roles.clone(),
        startup_timeout: STARTUP,
        failover_hold: endpoint.failover_hold,
        read_policy: ReadPolicy { max_lag: endpoint.max_lag, fall_back: endpoint.read_only_fallback },
        proxies,
    }
}

/// A member that is known by a name only is not believed by its address; `endpoint.proxies` can say it.
fn address_of(host: &str) -> Option<Network> {
    let address: std::net::IpAddr = host.parse().ok()?;
    Some(Network { address, prefix: if address.is_ipv4() { 32 } else { 128 } })
}

/// The parts that a router needs too.
pub(super) struct Front {
    serving: Serving,
}

impl Front {
    pub(super) fn start(
        config: &EndpointConfig,
        routes: Arc<Routes>,
        settings: DoorSettings,
    ) -> std::io::Result<Front> {
        let door = Door::new(routes, Arc::default(), settings.clone(), hooks(usize::MAX >> 4));
        door.replace(settings, hooks(usize::MAX >> 4), Arc::new(NoBarrier));
        Ok(Front { serving: start(config, &door)? })
    }

    pub(super) fn end(self) {
        self.serving.end();
    }
}
