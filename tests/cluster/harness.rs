//! The demo's own parts against real servers: what it says of an outage, an error, a lost row has to be right.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pgvigil::demo::sql::{self, Login};
use pgvigil::demo::writer::{Address, Ids, Writer};

const PATIENCE: Duration = Duration::from_secs(20);

/// A plain PostgreSQL of the machine's newest version, on a socket-less free port; ends with the test.
struct Plain {
    bin: PathBuf,
    directory: tempfile::TempDir,
    port: u16,
}

impl Plain {
    fn start() -> Plain {
        let bin = pgvigil::cli::newest_bin_dir().expect("PostgreSQL is installed");
        let directory = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if nix::unistd::geteuid().is_root() {
            let postgres = nix::unistd::User::from_name("postgres").unwrap().unwrap();
            std::os::unix::fs::chown(directory.path(), Some(postgres.uid.as_raw()), Some(postgres.gid.as_raw()))
                .unwrap();
        }
        let plain = Plain { bin, directory, port };
        plain.run("initdb", &["-A", "trust", "-U", "postgres", "--no-sync", "-D", plain.data()]);
        plain.pg_ctl("start");
        plain
    }

    fn data(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    fn pg_ctl(&self, what: &str) {
        let options =
            format!("-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off", self.port);
        let log = self.directory.path().join("log");
        let log = log.to_str().unwrap();
        match what {
            "start" => self.run("pg_ctl", &["start", "-w", "-D", self.data(), "-l", log, "-o", &options]),
            other => self.run("pg_ctl", &[other, "-w", "-m", "immediate", "-D", self.data()]),
        }
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let program = self.bin.join(program);
        let mut command = if nix::unistd::geteuid().is_root() {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        let output = command.args(arguments).current_dir("/").stdout(std::process::Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn login(&self) -> Login {
        Login { user: "postgres".to_owned(), password: String::new(), ..Login::superuser() }
    }

    fn address(&self) -> Address {
        Address { member: "plain".to_owned(), at: ([127, 0, 0, 1], self.port).into() }
    }

    async fn execute(&self, statement: &str) {
        let session = sql::connect(self.port, &self.login(), PATIENCE).await.unwrap();
        session.batch_execute(statement).await.unwrap();
    }

    async fn read_only(&self, on: bool) {
        self.execute(&format!("ALTER SYSTEM SET default_transaction_read_only = {on}")).await;
        self.execute("SELECT pg_reload_conf()").await;
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        if Path::new(self.data()).join("postmaster.pid").exists() {
            self.pg_ctl("stop");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_writer_sees_outages_errors_and_lost_rows() {
    let plain = Plain::start();
    plain.execute("CREATE TABLE writes (id bigint PRIMARY KEY, client int)").await;
    let nobody = Address { member: "nobody".to_owned(), at: ([127, 0, 0, 1], 1).into() };
    let mut writer = Writer::start(vec![nobody, plain.address()], &plain.login(), &Ids::default(), 2);
    assert!(writer.acknowledged_after(Instant::now(), PATIENCE).await);
    assert_eq!(writer.error_count(), 0, "an address where nobody listens is no error");
    assert_eq!(writer.last().map(|row| (row.server, row.timeline)), Some((1, 1)));

    let fault = Instant::now();
    plain.pg_ctl("stop");
    let down = fault.elapsed();
    plain.pg_ctl("start");
    assert!(writer.acknowledged_after(Instant::now(), PATIENCE).await);
    assert!(writer.outage(fault) > Duration::from_millis(5) && writer.outage(fault) <= down + PATIENCE);
    assert!(writer.errors(fault).0 >= 1);

    plain.read_only(true).await;
    let errors = writer.errors(fault).0;
    plain.read_only(false).await;
    assert!(errors < 100, "a read-only server is left, not asked for ever: {errors}");
    assert!(writer.acknowledged_after(Instant::now(), PATIENCE).await);

    writer.stop().await;
    let session = sql::connect(plain.port, &plain.login(), PATIENCE).await.unwrap();
    let checked = writer.check(&session).await.unwrap();
    assert_eq!((checked.acknowledged, checked.lost.len()), (writer.acknowledged(), 0));
    session.batch_execute("DELETE FROM writes WHERE id IN (SELECT min(id) FROM writes)").await.unwrap();
    assert_eq!(writer.check(&session).await.unwrap().lost.len(), 1);
    assert_eq!(writer.two_primaries(), Vec::<String>::new());
}
