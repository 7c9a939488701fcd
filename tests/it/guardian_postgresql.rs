//! The guardian around a real PostgreSQL with busy writers. Needs root and PostgreSQL, so it runs only when asked:
//! `PGVIGIL_TEST_POSTGRES=/usr/lib/postgresql/15/bin cargo test --test it guardian_postgresql -- --nocapture`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use pgvigil::core::timeline::Term;
use pgvigil::core::view::{Exit, GuardState};
use pgvigil::fencing::{GuardianFence, GuardianOptions, SystemClock};
use pgvigil::ports::{Clock, Fence, Launch, StopSignal};

const WRITERS: usize = 20;
const SOON: Duration = Duration::from_secs(20);

struct Server {
    bin: PathBuf,
    directory: tempfile::TempDir,
    user: User,
}

impl Server {
    fn new(bin: PathBuf) -> Server {
        let user = User::from_name("postgres").unwrap().expect("a user postgres");
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let home = directory.path().join("pg");
        std::fs::create_dir(&home).unwrap();
        nix::unistd::chown(&home, Some(user.uid), Some(user.gid)).unwrap();
        let server = Server { bin, directory, user };
        let initdb = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--init-groups"])
            .arg(server.bin.join("initdb"))
            .args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"])
            .arg(server.data())
            .current_dir("/")
            .stdout(Stdio::null())
            .status();
        assert!(initdb.unwrap().success());
        server
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("pg")
    }

    fn data(&self) -> PathBuf {
        self.home().join("data")
    }

    fn launch(&self) -> Launch {
        let settings = [
            format!("unix_socket_directories={}", self.home().display()),
            "listen_addresses=".into(),
            "restart_after_crash=off".into(),
            "max_connections=50".into(),
        ];
        let mut arguments = vec!["-D".to_owned(), self.data().display().to_string()];
        arguments.extend(settings.into_iter().flat_map(|setting| ["-c".to_owned(), setting]));
        Launch {
            program: self.bin.join("postgres"),
            arguments,
            user: Some((self.user.uid.as_raw(), self.user.gid.as_raw(), vec![self.user.gid.as_raw()])),
            log_file: self.home().join("postgresql.log"),
            environment: vec![("LC_ALL".into(), "C".into())],
        }
    }

    async fn connect(&self) -> Option<tokio_postgres::Client> {
        let settings = format!("host={} user=postgres dbname=postgres", self.home().display());
        let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.ok()?;
        tokio::spawn(connection);
        Some(client)
    }

    async fn accepts(&self) -> tokio_postgres::Client {
        let begin = Instant::now();
        loop {
            if let Some(client) = self.connect().await {
                return client;
            }
            assert!(begin.elapsed() < SOON, "{}", std::fs::read_to_string(self.home().join("postgresql.log")).unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Processes that work in the data directory.
    fn alive(&self) -> usize {
        let data = self.data();
        let processes = std::fs::read_dir("/proc").unwrap().filter(|entry| {
            let Ok(entry) = entry else { return false };
            std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data)
        });
        processes.count()
    }
}

/// Writers that note when they were last acknowledged (MONOTONIC_RAW), and how often.
async fn write_busily(server: &Server) -> (Arc<AtomicU64>, Arc<AtomicU64>, Vec<tokio::task::JoinHandle<()>>) {
    let (last, count) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        let client = server.connect().await.unwrap();
        let (last, count) = (last.clone(), count.clone());
        writers.push(tokio::spawn(async move {
            while client.execute("insert into t values (1)", &[]).await.is_ok() {
                last.fetch_max(SystemClock.now().raw, Ordering::Relaxed);
                count.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    (last, count, writers)
}

async fn idle(fence: &GuardianFence) -> Exit {
    let begin = Instant::now();
    loop {
        match fence.status().await.state {
            GuardState::Idle { exit: Some(exit) } => return exit,
            other => assert!(begin.elapsed() < SOON, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_postgresql_under_load_dies_at_its_deadline() {
    let Ok(bin) = std::env::var("PGVIGIL_TEST_POSTGRES") else { return };
    let server = Server::new(PathBuf::from(bin));
    for (priority, control_group) in [(10, true), (0, true), (10, false), (0, false)] {
        let fence = GuardianFence::new(GuardianOptions {
            socket: server.directory.path().join("guardian.sock"),
            real_time_priority: priority,
            control_group: control_group.then(|| format!("pgvigil-test-pg-{}", std::process::id())),
            ttl: Duration::from_secs(8),
            program: PathBuf::from(env!("CARGO_BIN_EXE_pgvigil")),
            take_over: false,
        });
        fence.attach().await.unwrap();
        fence.start(&server.launch()).await.unwrap();
        let client = server.accepts().await;
        client.batch_execute("create table if not exists t (x int)").await.unwrap();

        // Renewed for a while, then not any more.
        let (last, count, writers) = write_busily(&server).await;
        let after = |ms| SystemClock.now().plus(Duration::from_millis(ms));
        fence.arm(Term(7), after(500)).await.unwrap();
        let page = fence.page().unwrap();
        let mut deadline = after(500);
        for _ in 0..30 {
            deadline = after(500);
            page.extend(Term(7), deadline);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for writer in writers {
            tokio::time::timeout(SOON, writer).await.unwrap().unwrap();
        }
        let begin = Instant::now();
        while server.alive() > 0 {
            assert!(begin.elapsed() < SOON);
        }
        let late = (last.load(Ordering::Relaxed) as i64 - deadline.raw as i64) as f64 / 1e6;
        let exit = idle(&fence).await;
        let guard = fence.status().await;
        println!(
            "real-time {}, control group {}: {} commits, last acknowledgement {late:+.2} ms from F",
            guard.real_time,
            guard.control_group,
            count.load(Ordering::Relaxed)
        );
        assert_eq!(exit.how, "killed by the guardian: deadline of term 7 passed");

        // It comes back after crash recovery, and stops in order.
        fence.disarm().await.unwrap();
        fence.start(&server.launch()).await.unwrap();
        drop(server.accepts().await);
        fence.signal(StopSignal::Reload).await.unwrap();
        fence.signal(StopSignal::Fast).await.unwrap();
        let begin = Instant::now();
        let exit = idle(&fence).await;
        assert!(exit.orderly && exit.start_number == 2, "{exit:?}");
        println!("orderly stop took {:?}", begin.elapsed());

        // Killed by the agent, under load.
        fence.start(&server.launch()).await.unwrap();
        drop(server.accepts().await);
        let (last, _, writers) = write_busily(&server).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let asked = SystemClock.now();
        let killed = fence.kill(SOON).await.unwrap();
        println!("kill answered after {:?}: {killed:?}", SystemClock.now().since(asked));
        assert_eq!((killed.survivors, server.alive()), (0, 0));
        for writer in writers {
            writer.await.unwrap();
        }
        println!(
            "last acknowledgement {:+.2} ms from the order",
            (last.load(Ordering::Relaxed) as i64 - asked.raw as i64) as f64 / 1e6
        );

        // And with the guardian killed, under load.
        fence.start(&server.launch()).await.unwrap();
        drop(server.accepts().await);
        let (last, _, writers) = write_busily(&server).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let guardian = fence.details().await.unwrap().guardian;
        let died = SystemClock.now();
        kill(Pid::from_raw(guardian), Signal::SIGKILL).unwrap();
        for writer in writers {
            tokio::time::timeout(SOON, writer).await.unwrap().unwrap();
        }
        let begin = Instant::now();
        while server.alive() > 0 {
            assert!(begin.elapsed() < SOON);
        }
        println!(
            "guardian killed: last acknowledgement {:+.2} ms after",
            (last.load(Ordering::Relaxed) as i64 - died.raw as i64) as f64 / 1e6
        );
        fence.attach().await.unwrap();
        fence.dismiss().await.unwrap();
        let begin = Instant::now();
        while Path::new(&server.directory.path().join("guardian.sock")).exists() {
            assert!(begin.elapsed() < SOON);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(fence);
    }
}
