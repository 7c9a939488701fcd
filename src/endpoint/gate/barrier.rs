//! A commit of the gate's own: when it returns, whatever was committed before it is as durable as the cluster promises.
//!
//! One connection, one barrier at a time, shared by everybody who asked before it began. The connection is opened when
//! the first one asks and kept. `pg_logical_emit_message(true, …)`: a transaction that writes no WAL waits for nobody.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};

use crate::config::Secret;

/// A barrier that takes longer is given up, and with it the answers that wait for it. Longer than a standby's absence is
/// borne before the primary goes on without it.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
const BARRIER: &str = "SELECT pg_catalog.pg_logical_emit_message(true, 'pgvigil', '')";
/// Sessions that may ask at the same time; more wait for room.
const ASKING: usize = 1024;

/// What comes of a barrier.
pub type Passing = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

pub trait Barrier: Send + Sync {
    /// Returns when a barrier that began after this call has returned.
    fn pass(&self) -> Passing;
}

/// For sessions that need none.
pub struct NoBarrier;

impl Barrier for NoBarrier {
    fn pass(&self) -> Passing {
        Box::pin(async { Err("there is no barrier on this way".to_owned()) })
    }
}

/// Where the gate's own connection goes, and as whom.
#[derive(Clone, Debug)]
pub struct Login {
    pub socket_dir: PathBuf,
    pub port: u16,
    pub user: String,
    pub password: Secret,
}

type Waiting = oneshot::Sender<Result<(), String>>;

#[derive(Clone)]
pub struct PostgresBarrier {
    asking: mpsc::Sender<Waiting>,
    pub counts: Arc<Counts>,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub returned: AtomicU64,
    pub failed: AtomicU64,
}

impl PostgresBarrier {
    /// The task ends when the last handle is dropped.
    pub fn start(login: Login) -> PostgresBarrier {
        let (asking, asked) = mpsc::channel(ASKING);
        let counts = Arc::new(Counts::default());
        tokio::spawn(serve(login, asked, counts.clone()));
        PostgresBarrier { asking, counts }
    }
}

impl Barrier for PostgresBarrier {
    fn pass(&self) -> Passing {
        let asking = self.asking.clone();
        Box::pin(async move {
            let (sender, answer) = oneshot::channel();
            asking.send(sender).await.map_err(|_| "the endpoint is ending".to_owned())?;
            answer.await.map_err(|_| "the endpoint is ending".to_owned())?
        })
    }
}

async fn serve(login: Login, mut asked: mpsc::Receiver<Waiting>, counts: Arc<Counts>) {
    let mut session: Option<Session> = None;
    let mut waiting = Vec::new();
    while asked.recv_many(&mut waiting, ASKING).await > 0 {
        let passed = timeout(PATIENCE, one(&mut session, &login)).await.unwrap_or_else(|_| {
            Err(format!("no barrier returned within {} s: too few standbys acknowledge", PATIENCE.as_secs()))
        });
        if let Err(why) = &passed {
            // Its state is not known; the next barrier begins anew.
            session = None;
            tracing::warn!(why, sessions = waiting.len(), "a barrier did not return");
        }
        let count = if passed.is_ok() { &counts.returned } else { &counts.failed };
        count.fetch_add(1, Ordering::Relaxed);
        for sender in waiting.drain(..) {
            // Whoever asked may be gone.
            let _ = sender.send(passed.clone());
        }
    }
}

async fn one(session: &mut Option<Session>, login: &Login) -> Result<(), String> {
    let open = session.as_ref().filter(|session| !session.client.is_closed());
    if open.is_none() {
        *session = Some(Session::open(login).await?);
    }
    let Some(session) = session else { return Err("no connection".to_owned()) };
    session.noticed.store(false, Ordering::SeqCst);
    session.client.simple_query(BARRIER).await.map_err(|error| sentence(&error))?;
    if session.noticed.load(Ordering::SeqCst) {
        // Its own wait was cut short by somebody with the right to do so: it proves nothing.
        return Err("PostgreSQL ended the barrier's wait for standbys".to_owned());
    }
    Ok(())
}

struct Session {
    client: Client,
    /// Any notice since the last look. Read in the order of the stream, so it is there before the answer it belongs to.
    noticed: Arc<AtomicBool>,
    driver: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    async fn open(login: &Login) -> Result<Session, String> {
        let path = login.socket_dir.join(format!(".s.PGSQL.{}", login.port));
        let connect = async {
            let socket = UnixStream::connect(&path).await.map_err(|error| format!("{}: {error}", path.display()))?;
            let mut config = Config::new();
            config
                .user(&login.user)
                .password(login.password.expose())
                .dbname("postgres")
                .application_name("pgvigil barrier")
                .options("-c synchronous_commit=on -c client_min_messages=notice -c statement_timeout=0");
            config.connect_raw(socket, NoTls).await.map_err(|error| sentence(&error))
        };
        let (client, mut connection) =
            timeout(CONNECT, connect).await.map_err(|_| format!("no connection within {CONNECT:?}"))??;
        let noticed = Arc::new(AtomicBool::new(false));
        let flag = noticed.clone();
        let driver = tokio::spawn(async move {
            // Ends with the connection; its error is the query's.
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if matches!(message, AsyncMessage::Notice(_)) {
                    flag.store(true, Ordering::SeqCst);
                }
            }
        });
        Ok(Session { client, noticed, driver })
    }
}

fn sentence(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => error.to_string(),
    }
}
