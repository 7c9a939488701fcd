//! The real guardian process around trees of shells: deadlines, agents that die, hang and come back, and what is left.
//!
//! PostgreSQL's stand-in forks a child, a daemon in a session of its own and a double-forked orphan; all carry a mark in
//! their environment, and "dead" means that no living process carries it. Each test runs with a control group (where the
//! machine has one) and without.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use nix::unistd::Pid;
use pgvigil::core::Moment;
use pgvigil::core::timeline::Term;
use pgvigil::core::view::{Exit, GuardState};
use pgvigil::fencing::{GuardianFence, GuardianOptions, SystemClock};
use pgvigil::guardian::wire::{self, Answer, Request};
use pgvigil::ports::{Clock, Fence, FenceError, Launch, StopSignal};

const SOON: Duration = Duration::from_secs(10);
const TTL: Duration = Duration::from_secs(5);
const TERM: Term = Term(4);

/// With an orderly end at SIGINT, like a fast shutdown.
const TREE: &str = r#"
    trap 'exit 0' INT
    (while :; do sleep 0.01; done) &
    setsid sh -c 'while :; do sleep 0.01; done' &
    (setsid sh -c 'while :; do sleep 0.01; done' &)
    echo ready
    while :; do sleep 0.01; done
"#;

struct Rig {
    directory: tempfile::TempDir,
    options: GuardianOptions,
    mark: String,
    fence: GuardianFence,
    guardian: i32,
}

impl Rig {
    /// An agent attached to a fresh guardian.
    async fn new(control_group: bool) -> Rig {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("pgvigil-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = tempfile::tempdir().unwrap();
        let options = GuardianOptions {
            socket: directory.path().join("guardian.sock"),
            real_time_priority: 10,
            control_group: control_group.then(|| mark.clone()),
            ttl: TTL,
            program: PathBuf::from(env!("CARGO_BIN_EXE_pgvigil")),
            take_over: false,
        };
        let fence = GuardianFence::new(options.clone());
        fence.attach().await.unwrap();
        let guardian = fence.details().await.unwrap().guardian;
        Rig { directory, options, mark, fence, guardian }
    }

    fn launch(&self, script: &str) -> Launch {
        launch(self.directory.path(), &self.mark, script)
    }

    /// PostgreSQL's stand-in runs, all of its processes are there.
    async fn start_tree(&self) {
        self.fence.start(&self.launch(TREE)).await.unwrap();
        wait_until("the tree is complete", || self.alive() >= 4).await;
    }

    fn alive(&self) -> usize {
        marked(&self.mark).len()
    }

    async fn all_dead(&self) {
        // A look at /proc is not atomic: one that was just forked may be missed once.
        wait_until("every process is dead", || (0..3).all(|_| self.alive() == 0)).await;
    }

    async fn state(&self) -> GuardState {
        self.fence.status().await.state
    }

    async fn idle(&self) -> Option<Exit> {
        let begin = Instant::now();
        loop {
            if let GuardState::Idle { exit } = self.state().await {
                return exit;
            }
            assert!(begin.elapsed() < SOON, "not idle: {:?}", self.state().await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("guardian.sock.log")).unwrap_or_default()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Its second kills what is left and clears away. Only if the number is still the guardian's.
        if is_process(self.guardian, "pgvigil-guard") {
            let _ = kill(Pid::from_raw(self.guardian), Signal::SIGCONT);
            let _ = kill(Pid::from_raw(self.guardian), Signal::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("the guardian's log:\n{}", self.log());
        }
    }
}

fn launch(directory: &Path, mark: &str, script: &str) -> Launch {
    Launch {
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        user: None,
        log_file: directory.join("postgresql.log"),
        environment: vec![("MARK".into(), mark.into()), ("PATH".into(), "/usr/bin:/bin".into())],
    }
}

/// Living processes that carry the mark.
fn marked(mark: &str) -> Vec<i32> {
    let mark = format!("MARK={mark}\0");
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let carries = environment.windows(mark.len()).any(|w| w == mark.as_bytes());
        (carries && !matches!(state_of(pid), None | Some('Z' | 'X'))).then_some(pid)
    });
    processes.collect()
}

fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}

fn state_of(pid: i32) -> Option<char> {
    stat_fields(pid)?.first()?.chars().next()
}

/// Field 41 of the kernel's list, 3 come before the list here: 0 is SCHED_OTHER, 1 SCHED_FIFO.
fn policy_of(pid: i32) -> Option<String> {
    stat_fields(pid)?.get(41 - 3).cloned()
}

fn parent_of(pid: i32) -> Option<i32> {
    stat_fields(pid)?.get(1)?.parse().ok()
}

fn is_process(pid: i32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
}

async fn wait_until(what: &str, mut level: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !level() {
        assert!(begin.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn after(milliseconds: u64) -> Moment {
    SystemClock.now().plus(Duration::from_millis(milliseconds))
}

fn refused(result: Result<(), FenceError>) -> String {
    match result {
        Err(FenceError::Refused { why, .. }) => why,
        other => panic!("not refused: {other:?}"),
    }
}

const KILLED_AT_F: &str = "killed by the guardian: deadline of term 4 passed";

// === The deadline ===

#[tokio::test]
async fn a_passed_deadline_kills_every_process_and_is_told_once() {
    for control_group in [true, false] {
        let rig = Rig::new(control_group).await;
        rig.start_tree().await;
        let deadline = after(300);
        rig.fence.arm(TERM, deadline).await.unwrap();
        assert!(matches!(rig.state().await, GuardState::Running { armed: Some(TERM), .. }));
        rig.all_dead().await;
        assert!(SystemClock.now().any_reached(deadline), "killed before its time");
        let exit = rig.idle().await.unwrap();
        assert_eq!(exit, Exit { how: KILLED_AT_F.into(), orderly: false, start_number: 1 });

        // A passed deadline stays passed: nothing starts or is armed under it until it is disarmed.
        assert!(refused(rig.fence.start(&rig.launch(TREE)).await).contains("disarm before a start"));
        assert!(refused(rig.fence.arm(TERM, after(1000)).await).contains("disarm first"));
        rig.fence.disarm().await.unwrap();
        rig.start_tree().await;
        assert_eq!(rig.fence.details().await.unwrap().start_number, 2);
    }
}

#[tokio::test]
async fn a_deadline_that_moves_keeps_postgresql_alive_until_it_stops_moving() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    rig.fence.arm(TERM, after(300)).await.unwrap();
    let page = rig.fence.page().unwrap();
    let first = after(300);
    let mut last = first;
    while !SystemClock.now().any_reached(first.plus(Duration::from_millis(600))) {
        last = after(300);
        page.extend(TERM, last);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(rig.alive() >= 4);
    rig.all_dead().await;
    assert!(SystemClock.now().any_reached(last));
    assert_eq!(rig.idle().await.unwrap().how, KILLED_AT_F);
}

#[tokio::test]
async fn deadlines_of_another_term_or_beyond_the_lease_are_not_taken() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    assert!(refused(rig.fence.arm(TERM, after(6000)).await).contains("further away"));
    rig.fence.arm(TERM, after(800)).await.unwrap();
    assert!(refused(rig.fence.arm(Term(3), after(900)).await).contains("term 4 is armed"));
    let page = rig.fence.page().unwrap();
    page.extend(TERM, after(6000));
    wait_for_status(&rig, |status| status.ignored_deadlines == 1).await;
    page.extend(Term(5), after(2000));
    wait_for_status(&rig, |status| status.ignored_terms == 1).await;
    rig.all_dead().await;
    assert_eq!(rig.idle().await.unwrap().how, KILLED_AT_F);
    // Each was counted once, however often the page was read.
    let status = rig.fence.details().await.unwrap();
    assert_eq!((status.ignored_deadlines, status.ignored_terms), (1, 1));
}

async fn wait_for_status(rig: &Rig, level: impl Fn(&wire::Status) -> bool) {
    let begin = Instant::now();
    loop {
        let status = rig.fence.details().await.unwrap();
        if level(&status) {
            return;
        }
        assert!(begin.elapsed() < SOON, "{status:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_same_term_armed_again_only_grows_and_a_higher_term_takes_over() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    let far = after(4000);
    rig.fence.arm(TERM, far).await.unwrap();
    rig.fence.arm(TERM, after(500)).await.unwrap();
    assert_eq!(rig.fence.details().await.unwrap().deadline.raw, far.raw);
    assert!(refused(rig.fence.disarm().await).contains("not dead"));
    rig.fence.arm(Term(5), after(300)).await.unwrap();
    rig.all_dead().await;
    assert!(rig.idle().await.unwrap().how.contains("term 5"));
}

#[tokio::test]
async fn an_old_page_is_not_read_after_a_new_attachment() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    rig.fence.arm(TERM, after(700)).await.unwrap();
    // Still mapped, as in an agent that was stopped and thaws now.
    let old_page = rig.fence.page().unwrap();
    let taking_over = GuardianOptions { take_over: true, ..rig.options.clone() };
    let successor = GuardianFence::new(taking_over);
    successor.attach().await.unwrap();
    old_page.extend(TERM, after(4000));
    rig.all_dead().await;
    let GuardState::Idle { exit: Some(exit) } = successor.status().await.state else { panic!() };
    assert_eq!(exit.how, KILLED_AT_F);
    // And the replaced agent did not take the end of its connection for the guardian's death.
    assert!(matches!(rig.state().await, GuardState::Absent { .. }));
    assert!(is_process(rig.guardian, "pgvigil-guard"));
}

// === Agents that are processes of their own ===

/// Not a test by itself: the body of the agents that the tests kill and stop. Renews every 50 ms when told to.
#[tokio::test]
async fn agent_process() {
    let Ok(socket) = std::env::var("PGVIGIL_TEST_AGENT") else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let span: u64 = variable("PGVIGIL_TEST_SPAN").parse().unwrap();
    let fence = GuardianFence::new(GuardianOptions {
        socket: socket.clone().into(),
        real_time_priority: 10,
        control_group: None,
        ttl: TTL,
        program: "/nonexistent".into(),
        take_over: false,
    });
    fence.attach().await.unwrap();
    let directory = Path::new(&socket).parent().unwrap();
    fence.start(&launch(directory, &variable("PGVIGIL_TEST_TREE_OF"), TREE)).await.unwrap();
    fence.arm(TERM, after(span)).await.unwrap();
    let page = fence.page().unwrap();
    println!("\nagent ready");
    loop {
        if variable("PGVIGIL_TEST_RENEW") == "1" {
            page.extend(TERM, after(span));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

struct Agent(Child);

impl Agent {
    /// The rig's guardian, with another process as its agent, which has started and armed PostgreSQL.
    async fn take_from(rig: &Rig, span: u64, renew: bool) -> Agent {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guardian::agent_process", "--nocapture"])
            .env("PGVIGIL_TEST_AGENT", &rig.options.socket)
            .env("PGVIGIL_TEST_TREE_OF", &rig.mark)
            .env("PGVIGIL_TEST_SPAN", span.to_string())
            .env("PGVIGIL_TEST_RENEW", if renew { "1" } else { "0" })
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let ready = tokio::task::spawn_blocking(move || output.lines().any(|l| l.is_ok_and(|l| l == "agent ready")));
        assert!(ready.await.unwrap(), "the agent did not become ready: {}", rig.log());
        wait_until("the tree is complete", || rig.alive() >= 4).await;
        Agent(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guardian without an agent.
async fn orphaned() -> Rig {
    let mut rig = Rig::new(true).await;
    rig.fence = GuardianFence::new(rig.options.clone());
    rig
}

#[tokio::test]
async fn a_killed_agent_leaves_postgresql_alive_until_its_deadline() {
    let rig = orphaned().await;
    let mut agent = Agent::take_from(&rig, 1000, false).await;
    agent.signal(Signal::SIGKILL);
    agent.0.wait().unwrap();
    assert!(rig.alive() >= 4, "the agent's death alone does nothing");
    rig.all_dead().await;
    rig.fence.attach().await.unwrap();
    assert_eq!(rig.idle().await.unwrap().how, KILLED_AT_F);
}

#[tokio::test]
async fn a_new_agent_goes_on_where_a_killed_one_ended() {
    let rig = orphaned().await;
    let mut agent = Agent::take_from(&rig, 1000, true).await;
    agent.signal(Signal::SIGKILL);
    let last_possible = after(1000);
    agent.0.wait().unwrap();
    rig.fence.attach().await.unwrap();
    assert!(matches!(rig.state().await, GuardState::Running { armed: Some(TERM), .. }));
    let page = rig.fence.page().unwrap();
    while !SystemClock.now().any_reached(last_possible.plus(Duration::from_millis(300))) {
        page.extend(TERM, after(500));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(rig.alive() >= 4);
    rig.all_dead().await;
}

#[tokio::test]
async fn a_stopped_agent_is_killed_for_at_the_deadline_and_replaced_only_when_told() {
    let rig = orphaned().await;
    let agent = Agent::take_from(&rig, 600, true).await;
    // Renewed for longer than one span.
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(rig.alive() >= 4);
    agent.signal(Signal::SIGSTOP);
    rig.all_dead().await;
    assert!(refused(rig.fence.attach().await).contains("another agent is attached"));
    let successor = GuardianFence::new(GuardianOptions { take_over: true, ..rig.options.clone() });
    successor.attach().await.unwrap();
    let GuardState::Idle { exit: Some(exit) } = successor.status().await.state else { panic!() };
    assert_eq!(exit.how, KILLED_AT_F);
}

#[tokio::test]
async fn a_second_agent_is_refused_and_may_look_only() {
    let rig = Rig::new(true).await;
    let second = GuardianFence::new(rig.options.clone());
    assert!(refused(second.attach().await).contains("another agent is attached"));
    assert!(second.page().is_none());
    let raw = raw_connection(&rig);
    let Answer::Refused { why, .. } = exchange(&raw, &Request::Kill { within: 10 }) else { panic!() };
    assert_eq!(why, "attach first");
    assert!(matches!(exchange(&raw, &Request::Status), Answer::Done(_)));
}

// === Kill, stop, exit ===

#[tokio::test]
async fn a_kill_leaves_nothing_and_says_when_nothing_was_there() {
    for control_group in [true, false] {
        let rig = Rig::new(control_group).await;
        assert!(rig.fence.kill(SOON).await.unwrap().was_down);
        rig.start_tree().await;
        let killed = rig.fence.kill(SOON).await.unwrap();
        assert_eq!((killed.was_down, killed.survivors, rig.alive()), (false, 0, 0));
        let exit = rig.idle().await.unwrap();
        assert_eq!((exit.how.as_str(), exit.orderly), ("killed by the guardian: the agent asked", false));
    }
}

#[tokio::test]
async fn an_orderly_stop_is_told_as_one_also_to_the_next_agent() {
    for control_group in [true, false] {
        let rig = Rig::new(control_group).await;
        let mut changes = rig.fence.changes();
        rig.start_tree().await;
        changes.mark_unchanged();
        rig.fence.signal(StopSignal::Fast).await.unwrap();
        tokio::time::timeout(SOON, changes.changed()).await.unwrap().unwrap();
        // What it left behind was killed.
        let exit = rig.idle().await.unwrap();
        assert_eq!(exit, Exit { how: "exit code 0".into(), orderly: true, start_number: 1 });
        assert_eq!(rig.alive(), 0);
        let options = rig.options.clone();
        let successor = GuardianFence::new(GuardianOptions { take_over: true, ..options });
        successor.attach().await.unwrap();
        assert_eq!(successor.status().await.state, GuardState::Idle { exit: Some(exit) });
    }
}

#[tokio::test]
async fn children_do_not_outlive_a_postmaster_that_was_killed() {
    for control_group in [true, false] {
        let rig = Rig::new(control_group).await;
        rig.start_tree().await;
        let GuardState::Running { postmaster, .. } = rig.state().await else { panic!() };
        kill(Pid::from_raw(postmaster), Signal::SIGKILL).unwrap();
        rig.all_dead().await;
        assert_eq!(rig.idle().await.unwrap().how, "signal 9");
    }
}

#[tokio::test]
async fn a_start_that_cannot_be_is_refused_with_the_reason() {
    let rig = Rig::new(true).await;
    let mut launch = rig.launch("exit 3");
    launch.program = "/nonexistent/postgres".into();
    let why = refused(rig.fence.start(&launch).await);
    assert!(why.contains("/nonexistent/postgres") && why.contains("ENOENT"), "{why}");
    rig.idle().await;
    launch.program = "postgres".into();
    assert!(refused(rig.fence.start(&launch).await).contains("absolute path"));
    rig.fence.start(&rig.launch("exit 3")).await.unwrap();
    let begin = Instant::now();
    while rig.idle().await.unwrap().how != "exit code 3" {
        assert!(begin.elapsed() < SOON);
    }
}

#[tokio::test]
async fn postgresql_runs_as_its_user_with_its_groups_and_a_clean_slate() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can start as somebody else");
        return;
    }
    let rig = Rig::new(true).await;
    let world = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(rig.directory.path(), world).unwrap();
    let script = "id -u; id -g; id -G; grep -E 'SigBlk|SigIgn' /proc/self/status; env | sort; ls /proc/self/fd | wc -w";
    let launch = Launch { user: Some((65534, 65534, vec![65534, 12])), ..rig.launch(script) };
    rig.fence.start(&launch).await.unwrap();
    assert!(rig.idle().await.unwrap().orderly);
    let text = fs::read_to_string(&launch.log_file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..2], ["65534", "65534"], "{text}");
    assert!(lines[2] == "65534 12" || lines[2] == "12 65534", "{text}");
    // But for signals 32 and 33, which the C library keeps for itself and leaves as it found them.
    assert!(lines[3].ends_with("\t0000000000000000"), "{text}");
    assert!(lines[4].ends_with("\t0000000000000000") || lines[4].ends_with("\t0000000180000000"), "{text}");
    assert!(!text.contains("CARGO"), "the environment is the given one only: {text}");
    // Input, output, errors, and ls's own.
    assert_eq!(lines.last(), Some(&"4"), "{text}");
}

// === The guardian itself ===

#[tokio::test]
async fn malformed_messages_are_refused_and_the_guardian_goes_on() {
    let rig = Rig::new(true).await;
    let raw = raw_connection(&rig);
    let mut message = vec![0; 64];
    let length = wire::encode_request(&mut message, 9, &Request::Kill { within: 1 }).unwrap();
    for bytes in [&b"x"[..], &[0xff; 300], &message[..length - 1], &message[..length + 3], &[0x01; 16]] {
        assert!(matches!(exchange_bytes(&raw, bytes), Answer::Refused { .. }), "{bytes:?}");
    }
    let Answer::Refused { why, .. } = exchange_bytes(&raw, &vec![0; 60_000]) else { panic!() };
    assert!(why.contains("60000 bytes"), "{why}");
    assert!(matches!(exchange(&raw, &Request::Status), Answer::Done(_)));
    // Many who only look do not keep the agent out.
    let _more: Vec<OwnedFd> = (0..10).map(|_| raw_connection(&rig)).collect();
    assert!(matches!(rig.state().await, GuardState::Idle { .. }));
}

fn raw_connection(rig: &Rig) -> OwnedFd {
    let raw = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(raw.as_raw_fd(), &UnixAddr::new(&rig.options.socket).unwrap()).unwrap();
    raw
}

fn exchange(raw: &OwnedFd, request: &Request<'_>) -> Answer {
    let mut message = [0; 256];
    let length = wire::encode_request(&mut message, 1, request).unwrap();
    exchange_bytes(raw, &message[..length])
}

fn exchange_bytes(raw: &OwnedFd, bytes: &[u8]) -> Answer {
    send(raw.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
    let mut buffer = [0; wire::MAX_ANSWER];
    let length = recv(raw.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
    wire::decode_answer(&buffer[..length]).unwrap().1
}

#[tokio::test]
async fn real_time_priority_stays_with_the_guardian_and_memory_is_small() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    let guard = rig.fence.status().await;
    let status = rig.fence.details().await.unwrap();
    let memory = fs::read_to_string(format!("/proc/{}/status", rig.guardian)).unwrap();
    let field = |name: &str| memory.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
    println!("{guard:?}\n{status:?}\n{}, {}, {}", field("VmRSS"), field("RssAnon"), field("VmLck"));
    assert_eq!(policy_of(rig.guardian).as_deref(), Some(if guard.real_time { "1" } else { "0" }));
    for pid in marked(&rig.mark) {
        // A process may end between the two looks.
        assert!(matches!(policy_of(pid).as_deref(), None | Some("0")));
    }
    let resident: u64 = field("VmRSS").split_whitespace().nth(1).unwrap().parse().unwrap();
    // An unoptimised program carries several times the text and tables; the bound of 2 MB is the released one's, and is
    // measured by `scripts/bench memory`.
    let most = if cfg!(debug_assertions) { 16_384 } else { 2_048 };
    assert!(resident <= most, "{resident} kB are resident");
}

#[tokio::test]
async fn sigterm_is_ignored_while_postgresql_runs_and_ends_an_idle_guardian() {
    let rig = Rig::new(true).await;
    rig.start_tree().await;
    kill(Pid::from_raw(rig.guardian), Signal::SIGTERM).unwrap();
    wait_until("the log says so", || rig.log().contains("signal 15 ignored")).await;
    assert!(matches!(rig.state().await, GuardState::Running { .. }));
    rig.fence.kill(SOON).await.unwrap();
    kill(Pid::from_raw(rig.guardian), Signal::SIGTERM).unwrap();
    wait_until("the guardian is gone", || !is_process(rig.guardian, "pgvigil-guard")).await;
}

#[tokio::test]
async fn a_guardian_is_dismissed_only_without_postgresql_and_leaves_nothing_behind() {
    let mut rig = Rig::new(true).await;
    rig.start_tree().await;
    assert_eq!(refused(rig.fence.dismiss().await), "postgresql runs");
    rig.fence.kill(SOON).await.unwrap();
    let group = pgvigil::guardian::ControlGroup::locate(&rig.mark).ok();
    rig.fence.dismiss().await.unwrap();
    wait_until("its control groups are gone", || group.as_ref().is_none_or(|path| !path.exists())).await;
    assert!(matches!(rig.state().await, GuardState::Absent { .. }));
    // And a new one starts where it was.
    rig.fence.attach().await.unwrap();
    rig.start_tree().await;
    let guardian = rig.fence.details().await.unwrap().guardian;
    assert!(guardian != rig.guardian);
    rig.guardian = guardian;
}

#[tokio::test]
async fn postgresql_dies_with_the_guardian_and_the_agent_hears_of_it() {
    for control_group in [true, false] {
        let mut rig = Rig::new(control_group).await;
        rig.start_tree().await;
        assert!(rig.fence.status().await.death_covered);
        let mut changes = rig.fence.changes();
        changes.mark_unchanged();
        kill(Pid::from_raw(rig.guardian), Signal::SIGKILL).unwrap();
        rig.all_dead().await;
        tokio::time::timeout(SOON, changes.changed()).await.unwrap().unwrap();
        let GuardState::Absent { why } = rig.state().await else { panic!() };
        assert!(why.contains("the guardian died"), "{why}");
        assert_eq!(rig.fence.kill(SOON).await.unwrap().survivors, 0);
        // The next one is started where the dead one was.
        rig.fence.attach().await.unwrap();
        rig.guardian = rig.fence.details().await.unwrap().guardian;
        assert_eq!(rig.state().await, GuardState::Idle { exit: None });
        rig.start_tree().await;
    }
}

#[tokio::test]
async fn with_guardian_and_second_both_dead_the_agent_kills_the_control_group() {
    let mut rig = Rig::new(true).await;
    if !rig.fence.status().await.control_group {
        eprintln!("skipped: no control group to be had here");
        return;
    }
    rig.start_tree().await;
    let second = parent_of(rig.guardian).unwrap();
    assert!(is_process(second, "pgvigil-second"));
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    wait_for_status(&rig, |status| !status.death_covered).await;
    kill(Pid::from_raw(rig.guardian), Signal::SIGKILL).unwrap();
    rig.all_dead().await;
    rig.fence.attach().await.unwrap();
    rig.guardian = rig.fence.details().await.unwrap().guardian;
}

#[tokio::test]
async fn a_new_guardian_kills_what_a_dead_one_left() {
    let mut rig = Rig::new(true).await;
    if !rig.fence.status().await.control_group {
        eprintln!("skipped: no control group to be had here");
        return;
    }
    rig.start_tree().await;
    let fresh = GuardianFence::new(rig.options.clone());
    rig.fence = fresh;
    let second = parent_of(rig.guardian).unwrap();
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    kill(Pid::from_raw(rig.guardian), Signal::SIGKILL).unwrap();
    wait_until("the guardian is gone", || !is_process(rig.guardian, "pgvigil-guard")).await;
    assert!(rig.alive() >= 1, "PDEATHSIG reaches the postmaster only");
    rig.fence.attach().await.unwrap();
    rig.guardian = rig.fence.details().await.unwrap().guardian;
    rig.all_dead().await;
    assert_eq!(rig.idle().await, None);
}

#[tokio::test]
async fn a_kill_does_not_wait_for_a_stopped_guardian() {
    for control_group in [true, false] {
        let rig = Rig::new(control_group).await;
        rig.start_tree().await;
        kill(Pid::from_raw(rig.guardian), Signal::SIGSTOP).unwrap();
        let killed = rig.fence.kill(Duration::from_secs(2)).await.unwrap();
        assert_eq!((killed.survivors, rig.alive()), (0, 0));
    }
}

#[tokio::test]
async fn the_guardian_beats_while_it_lives_and_not_while_it_is_stopped() {
    let rig = Rig::new(true).await;
    let page = rig.fence.page().unwrap();
    let first = page.guardian_alive_at();
    wait_until("it beats", || page.guardian_alive_at() != first).await;
    kill(Pid::from_raw(rig.guardian), Signal::SIGSTOP).unwrap();
    wait_until("it is stopped", || state_of(rig.guardian) == Some('T')).await;
    let last = page.guardian_alive_at();
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(page.guardian_alive_at(), last);
}

#[tokio::test]
async fn without_a_program_to_start_attach_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let fence = GuardianFence::new(GuardianOptions {
        socket: directory.path().join("missing").join("guardian.sock"),
        real_time_priority: 0,
        control_group: None,
        ttl: TTL,
        program: env!("CARGO_BIN_EXE_pgvigil").into(),
        take_over: false,
    });
    let error = fence.attach().await.unwrap_err().to_string();
    assert!(error.contains("lock file") && error.contains("No such file"), "{error}");
    assert!(matches!(fence.status().await.state, GuardState::Absent { .. }));
}

// === How fast ===

/// Prints, and decides nothing: from F to the last process dead, with twenty busy children.
#[tokio::test]
async fn measure_deadline_to_last_death() {
    let busy = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do (while :; do :; done) & done; wait";
    for (priority, control_group) in [(10, true), (0, true), (10, false), (0, false)] {
        let mut worst = Duration::ZERO;
        let mut all = Vec::new();
        for _ in 0..3 {
            let mut rig = Rig::new(control_group).await;
            rig.fence.dismiss().await.unwrap();
            wait_until("dismissed", || !is_process(rig.guardian, "pgvigil-guard")).await;
            rig.options.real_time_priority = priority;
            rig.fence = GuardianFence::new(rig.options.clone());
            rig.fence.attach().await.unwrap();
            rig.guardian = rig.fence.details().await.unwrap().guardian;
            rig.fence.start(&rig.launch(busy)).await.unwrap();
            wait_until("all are there", || rig.alive() >= 21).await;
            let processes: Vec<OwnedFd> =
                marked(&rig.mark).into_iter().filter_map(|pid| pgvigil::guardian::pidfd_open(pid).ok()).collect();
            let deadline = after(700);
            rig.fence.arm(TERM, deadline).await.unwrap();
            // A thread that waits for each process's end: the last one's time is the time of the last death.
            let ended = tokio::task::spawn_blocking(move || {
                use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
                use std::os::fd::AsFd;
                for process in &processes {
                    poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
                }
                SystemClock.now()
            });
            let took = ended.await.unwrap().since(deadline);
            worst = worst.max(took);
            all.push(took);
            rig.all_dead().await;
        }
        println!("real-time priority {priority}, control group {control_group}: {all:?}, worst {worst:?}");
    }
}
