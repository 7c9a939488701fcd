//! The only file that knows every part: builds them, connects them, starts them, and brings them down in order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::agent::answers::Answers;
use crate::agent::execute::World;
use crate::agent::lease_keeper::LeaseKeeper;
use crate::agent::peer_watch::PeerWatch;
use crate::agent::run::{Agent, Asked, End, NotTaken, Taken, Wanted};
use crate::agent::state_file::StateFile;
use crate::agent::status::Status;
use crate::api::{self, Accepted, Api, Refusal};
use crate::config::Config;
use crate::core::endpoint::Report;
use crate::core::records::Durability;
use crate::core::route::EndpointPorts;
use crate::core::view::Me;
use crate::dcs::etcd::EtcdDcs;
use crate::endpoint::keeper::{self, Keeper};
use crate::endpoint::words::Settings;
use crate::fencing::{GuardianFence, GuardianOptions, SystemClock};
use crate::peers::HttpPeers;
use crate::ports::{Clock, Dcs, Fence, Postgres};
use crate::postgres::{LocalServer, roles};
use crate::storage::ProbeProcesses;

/// How long the API may take to finish its answers at the end.
const API_DRAIN: Duration = Duration::from_secs(2);

/// Runs the agent until it is told to end. Everything that can be refused is refused before anything is touched.
pub fn run(config: Config) -> anyhow::Result<()> {
    crate::telemetry::init(&config.log)?;
    // One provider for the whole process (docs/decisions/0003); an error means that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agent")
        .on_thread_start(crate::agent::priority::raise)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(run_agent(config))
}

async fn run_agent(config: Config) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.api.listen).await.with_context(|| {
        format!(
            "listen on {} (api.listen): is another agent running, or another program using the port?",
            config.api.listen
        )
    })?;
    let state = StateFile::open(&config.state_dir, &config.cluster, &config.name)?;
    let me = me(&config, &state)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let postgres: Arc<dyn Postgres> = Arc::new(LocalServer::new(&config)?);
    let dcs: Arc<dyn Dcs> = Arc::new(EtcdDcs::connect(&config.etcd, &config.cluster)?);
    let options = GuardianOptions::new(&config.guardian, &config.cluster, &config.name, config.policy.timings.ttl);
    let fence = Arc::new(GuardianFence::new(options));
    fence.attach().await.context("attach to the guardian")?;
    let disks = ProbeProcesses::start(&config).context("start the storage probes")?;
    let keeper =
        LeaseKeeper::start(dcs.clone(), clock.clone(), config.policy.timings).context("start the lease keeper")?;
    let takes_over_early = config.policy.durability != Durability::Async;
    keeper.hold_after(takes_over_early.then(|| config.policy.takeover.gate()));
    keeper.use_page(fence.page());
    let others = config.members.iter().map(|m| m.name.clone()).filter(|name| *name != config.name).collect();
    let port = Box::new(HttpPeers::new(&config));
    let peers = PeerWatch::start(port, config.cluster.clone(), others, clock.clone(), config.policy.timings)
        .context("start asking the other agents")?;
    info!(
        member = %config.name,
        cluster = %config.cluster,
        incarnation = %me.id.incarnation,
        start = me.start_counter,
        api = %config.api.listen,
        "agent started"
    );

    let world = World {
        dcs,
        postgres,
        fence: fence.clone(),
        disks: Arc::new(disks),
        clock: clock.clone(),
        keeper: Arc::new(keeper),
        peers: Arc::new(peers),
        state: Arc::new(Mutex::new(state)),
        kill_budget: config.policy.timings.kill_budget,
    };
    let (status_tx, status) = watch::channel(None);
    let (asked_tx, asked) = mpsc::channel(16);
    let (wanted_tx, wanted) = watch::channel(Wanted::Run);
    let shutdown = CancellationToken::new();

    let (report_tx, report) = watch::channel(None);
    let api = start_api(&config, listener, status.clone(), report, asked_tx, clock.clone(), shutdown.clone())?;
    let signals = tokio::spawn(signals(wanted_tx));
    let (report_tx, endpoint_done) = (report_tx, CancellationToken::new());
    let finish = Arc::new(AtomicBool::new(false));
    let endpoint =
        tokio::spawn(keep_endpoint(&config, &fence, status.clone(), report_tx, endpoint_done.clone(), finish.clone()));
    let supervision = tokio::spawn(tell_systemd(status));
    // On a worker thread: those have the priority, this one does not, and neither has what it starts.
    let agent = Agent::new(world, me, config.policy.clone(), asked, wanted, status_tx);
    let end = tokio::spawn(agent.run()).await.context("the decision loop ended by itself")?;

    // On a member whose PostgreSQL is stopped there is nothing to come in to; else clients stay where they are.
    finish.store(end == End::Stopped, Ordering::SeqCst);
    endpoint_done.cancel();
    if let Err(error) = endpoint.await {
        warn!(%error, "the endpoint's keeper ended by itself");
    }
    shutdown.cancel();
    signals.abort();
    supervision.abort();
    let stopped = tokio::task::spawn_blocking(move || api.join());
    if tokio::time::timeout(API_DRAIN, stopped).await.is_err() {
        warn!("the API did not end in time");
    }
    if end == End::Stopped {
        // PostgreSQL is down: nothing is left to guard.
        if let Err(error) = fence.dismiss().await {
            warn!(%error, "dismiss the guardian");
        }
    }
    info!(?end, "agent ended");
    Ok(())
}

fn me(config: &Config, state: &StateFile) -> anyhow::Result<Me> {
    let address = config.me();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").context("read the kernel's boot id")?;
    Ok(Me {
        id: state.id(),
        boot_id: boot_id.trim().to_owned(),
        start_counter: state.start_counter(),
        tags: config.tags.clone(),
        system_identifier: state.system_identifier(),
        configured: config.members.iter().map(|m| m.name.clone()).collect(),
        host: address.host.clone(),
        port: address.port,
        endpoint: config.endpoint.as_ref().and_then(|endpoint| {
            Some(EndpointPorts {
                read_write: endpoint.listen.first()?.port(),
                read_only: endpoint.listen_read_only.first().map(|listen| listen.port()),
            })
        }),
        api_url: format!("http://{}:{}", bracketed(&address.host), address.api_port),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// An IPv6 address as a URL wants it.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// The API lives on a thread and runtime of its own: a flood of requests delays no decision, a busy loop no answer.
fn start_api(
    config: &Config,
    listener: TcpListener,
    status: watch::Receiver<Option<Arc<Status>>>,
    endpoint: watch::Receiver<Option<Report>>,
    asked: mpsc::Sender<Asked>,
    clock: Arc<dyn Clock>,
    shutdown: CancellationToken,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let (requests_tx, mut requests) = mpsc::channel::<api::ApiRequest>(16);
    let answers = Arc::new(Answers { cluster: config.cluster.clone(), status: status.clone(), clock: clock.clone() });
    let api = Api {
        config: config.api.clone(),
        cluster: config.cluster.clone(),
        status,
        endpoint,
        requests: requests_tx,
        answers,
        clock,
    };
    // Between the API's words and the loop's.
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            let (answer_tx, answer) = tokio::sync::oneshot::channel();
            let passed = Asked {
                id: request.id,
                what: request.what,
                asked_by: request.asked_by,
                timeout: request.timeout,
                force: request.force,
                answer: answer_tx,
            };
            if asked.send(passed).await.is_err() {
                return;
            }
            tokio::spawn(async move {
                let said = match answer.await {
                    Ok(Ok(Taken::New)) => Ok(Accepted::New),
                    Ok(Ok(Taken::Known)) => Ok(Accepted::Known),
                    Ok(Err(NotTaken::IdInUse)) => Err(Refusal::IdTaken),
                    Ok(Err(NotTaken::NothingWritten(why))) => Err(Refusal::Unavailable(why)),
                    Ok(Err(NotTaken::Unknown(why))) => Err(Refusal::Unknown(why)),
                    Err(_) => Err(Refusal::Unavailable("the agent is ending".to_owned())),
                };
                // Whoever asked may have gone away; the request stands all the same.
                let _ = request.answer.send(said);
            });
        }
    });
    let listener = listener.into_std().context("hand the listener to the API")?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the API's runtime")?;
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                match TcpListener::from_std(listener) {
                    Ok(listener) => api::serve(api, listener, shutdown).await,
                    Err(error) => tracing::error!(%error, "the API cannot listen"),
                }
            });
        })
        .context("start the API's thread")
}

/// Starts, adopts and tells the endpoint; where none is configured, ends one that was left behind.
fn keep_endpoint(
    config: &Config,
    fence: &Arc<GuardianFence>,
    status: watch::Receiver<Option<Arc<Status>>>,
    report: watch::Sender<Option<Report>>,
    end: CancellationToken,
    finish: Arc<AtomicBool>,
) -> impl Future<Output = ()> + Send + 'static {
    let socket = config.endpoint_socket();
    let fence = fence.clone();
    let keeper = config.endpoint.clone().map(|endpoint| Keeper {
        socket: socket.clone(),
        settings: Settings {
            member: config.name.clone(),
            endpoint,
            socket_dir: config.postgresql.socket_dir.clone(),
            port: config.postgresql.port,
            role: roles::AGENT.to_owned(),
            password: config.postgresql.internal_password.expose().to_owned(),
            reserved_roles: [roles::AGENT, roles::REPLICATION, roles::REWIND].map(str::to_owned).to_vec(),
            capacity: client_places(config),
            members: config.members.iter().map(|member| member.host.clone()).collect(),
        },
        log: config.log.clone(),
        status,
        page: Arc::new(move || fence.page_file()),
        report,
    });
    async move {
        match keeper {
            Some(keeper) => keeper.run(end, finish).await,
            None => keeper::dismiss(&socket).await,
        }
    }
}

/// What PostgreSQL's default leaves for clients: superusers' reserve, and the agent's own connections with the barrier's.
fn client_places(config: &Config) -> usize {
    const RESERVED: usize = 3 + 5;
    let all =
        config.postgresql.parameters.get("max_connections").and_then(|text| text.parse().ok()).unwrap_or(100_usize);
    all.saturating_sub(RESERVED).max(1)
}

/// SIGTERM and SIGINT stop orderly; SIGUSR1 ends the agent and leaves PostgreSQL under the guardian.
async fn signals(wanted: watch::Sender<Wanted>) {
    let streams =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::user_defined1()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut user1)) = streams else {
        warn!("signals cannot be listened for: stop the agent through its API only");
        return;
    };
    loop {
        let want = tokio::select! {
            _ = terminate.recv() => Wanted::Stop,
            _ = interrupt.recv() => Wanted::Stop,
            _ = user1.recv() => Wanted::Detach,
        };
        info!(?want, "signal received");
        wanted.send_replace(want);
    }
}

/// Ready once the loop came round; after that a sign of life for every round, from the loop's own word.
async fn tell_systemd(mut status: watch::Receiver<Option<Arc<Status>>>) {
    let mut said_ready = false;
    while status.changed().await.is_ok() {
        let line = status.borrow_and_update().as_ref().map(|s| format!("{}: {}", s.plan.rule, s.plan.reason));
        let Some(line) = line else { continue };
        let mut words = vec![sd_notify::NotifyState::Status(&line), sd_notify::NotifyState::Watchdog];
        if !said_ready {
            words.push(sd_notify::NotifyState::Ready);
            said_ready = true;
        }
        // Without systemd there is nobody to tell, which is no error.
        let _ = sd_notify::notify(&words);
    }
}
