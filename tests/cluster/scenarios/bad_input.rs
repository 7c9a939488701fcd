//! What a user meets who made a mistake: one sentence with the remedy, and nothing changed.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Stdio;

use pgvigil::demo::{Cluster, Options};

use super::*;

/// One member and one etcd: enough to refuse.
fn small() -> Options {
    Options { members: 1, etcd: 1, ..options() }
}

/// The member's configuration with some text replaced, in a file beside it.
fn altered(cluster: &Cluster, name: &str, replace: &[(&str, &str)]) -> PathBuf {
    let mut text = std::fs::read_to_string(cluster.members[0].config_file()).unwrap();
    for (from, to) in replace {
        assert!(text.contains(from), "{from} is not in {text}");
        text = text.replace(from, to);
    }
    let file = cluster.members[0].directory.join(name);
    std::fs::write(&file, text).unwrap();
    file
}

/// Runs an agent that has to end by itself: exit code and last line.
async fn refused(command: &[&str]) -> (i32, String) {
    let output =
        tokio::process::Command::new(command[0]).args(&command[1..]).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, output).await.expect("the agent refuses").unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (output.status.code().unwrap_or(-1), said)
}

async fn keys(cluster: &Cluster) -> Vec<String> {
    let mut client = etcd_client::Client::connect(cluster.etcd.endpoints(), None).await.unwrap();
    let all = etcd_client::GetOptions::new().with_prefix().with_keys_only();
    let found = client.get(format!("/pgvigil/{}/", cluster.name), Some(all)).await.unwrap();
    found
        .kvs()
        .iter()
        .map(|kv| kv.key_str().unwrap_or_default().rsplit('/').next().unwrap_or_default().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_work_ends_with_a_sentence() {
    let cluster = Cluster::prepare(small()).unwrap();
    let member = &cluster.members[0];
    let pg = member.directory.join("pg");
    let config = member.config_file();
    let config = config.to_str().unwrap();

    let check = |what: &str, (code, said): (i32, String), expected: i32, words: &[&str]| {
        println!("{what}: {code}: {}", said.trim());
        assert_eq!(code, expected, "{what}: {said}");
        for word in words {
            assert!(said.contains(word), "{what}: `{word}` is not in: {said}");
        }
        assert!(!said.contains("panicked"), "{what}: {said}");
        assert_eq!(listing(&pg), [], "{what}: nothing is made");
    };

    let taken = TcpListener::bind(("127.0.0.1", member.api_port)).unwrap();
    let api_port = member.api_port.to_string();
    check("API port in use", refused(&[BINARY, "agent", "--config", config]).await, 1, &["api.listen", &api_port]);
    drop(taken);

    let programs = altered(&cluster, "programs.toml", &[("data_dir =", "bin_dir = \"/nonexistent\"\ndata_dir =")]);
    let run = refused(&[BINARY, "agent", "--config", programs.to_str().unwrap()]).await;
    check("missing programs", run, 1, &["bin_dir", "/nonexistent"]);

    let nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"];
    let agent = [&nobody[..], &[BINARY, "agent", "--config", config]].concat();
    check("unreadable", refused(&agent).await, 2, &["configuration", "ermission denied", "let this user read it"]);
    // It may read everything, and write nothing.
    let user = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    for file in ["pgvigil.toml", "superuser.password", "internal.password"] {
        chown(member.directory.join(file), Some(user.uid.as_raw()), None).unwrap();
    }
    check("no rights", refused(&agent).await, 1, &["state", "ermission denied"]);

    assert_eq!(keys(&cluster).await, Vec::<String>::new());
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_not_ours_is_left_alone() {
    let mut cluster = Cluster::prepare(small()).unwrap();
    let data = cluster.members[0].data_dir();
    for (what, files, word) in [
        ("foreign files", vec![("holiday.jpg", "bytes")], "is not empty"),
        ("another version", vec![("PG_VERSION", "13\n"), ("postgresql.conf", "")], "postgresql 13"),
    ] {
        std::fs::create_dir(&data).unwrap();
        for (name, text) in &files {
            std::fs::write(data.join(name), text).unwrap();
        }
        let before = listing(&data);
        cluster.start_agent(0).unwrap();
        let said = until_status(&cluster, 0, what, |status| rule(status) == "identity.refused").await;
        println!("{what}: {}", reason(&said));
        assert!(reason(&said).contains(word), "{what}: {}", reason(&said));
        assert!(reason(&said).contains(data.to_str().unwrap()), "{what}: {}", reason(&said));
        cluster.stop_member(0).await.unwrap();
        assert_eq!(listing(&data), before, "{what}");
        assert_eq!(keys(&cluster).await, Vec::<String>::new(), "{what}");
        std::fs::remove_dir_all(&data).unwrap();
    }

    // etcd cannot be reached: nothing is begun, and the reason names who does not answer.
    for member in 0..cluster.etcd.members.len() {
        cluster.etcd.stop_member(member).await;
    }
    cluster.start_agent(0).unwrap();
    let said = until_status(&cluster, 0, "etcd away", |status| rule(status) == "store.unknown").await;
    println!("etcd away: {}", reason(&said));
    assert!(reason(&said).contains("nothing is changed"), "{}", reason(&said));
    cluster.stop_member(0).await.unwrap();
    assert!(!data.exists());
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_and_a_wrong_cluster_are_refused() {
    let cluster = Cluster::start(small()).await.unwrap();
    cluster.ready(PATIENCE).await.unwrap();
    let writer = cluster.pinned_writer();
    writes(&writer).await;
    let member = &cluster.members[0];
    let listen = format!("listen = \"127.0.0.1:{}\"", member.api_port);
    let postmaster = member.postmaster();

    // Another agent on the same state directory.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let elsewhere = format!("listen = \"127.0.0.1:{free}\"");
    let (api_port, other_port) = (format!("api_port = {}", member.api_port), format!("api_port = {free}"));
    let ports = [(listen.as_str(), elsewhere.as_str()), (&api_port, &other_port)];
    let second = altered(&cluster, "second.toml", &ports);
    let (code, said) = refused(&[BINARY, "agent", "--config", second.to_str().unwrap()]).await;
    println!("second agent: {code}: {said}");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("state") && said.contains("another pgvigil agent"), "{said}");

    // The same name with directories of its own.
    let twin = cluster.members[0].directory.join("twin");
    let own = cluster.members[0].directory.display().to_string();
    let config = altered(&cluster, "twin.toml", &[&ports[..], &[(own.as_str(), twin.to_str().unwrap())]].concat());
    for directory in ["", "state", "pg", "run"] {
        std::fs::create_dir_all(twin.join(directory)).unwrap();
    }
    for file in ["superuser.password", "internal.password"] {
        std::fs::copy(cluster.members[0].directory.join(file), twin.join(file)).unwrap();
    }
    let mut agent = tokio::process::Command::new(BINARY)
        .args(["agent", "--config", config.to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let url = format!("http://127.0.0.1:{free}");
    let said = until("the twin says that its name is in use", async || {
        let client = Client::of(vec![url.clone()]);
        let (_, status) = client.look(&url, "/v1/status", Duration::from_secs(2)).await?;
        (rule(&status) == "identity.name_in_use").then_some(status)
    })
    .await;
    println!("twin: {}", reason(&said));
    assert!(reason(&said).contains(&cluster.members[0].url()), "{}", reason(&said));
    assert_eq!(listing(&twin.join("pg")), []);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    tokio::time::timeout(PATIENCE, agent.wait()).await.expect("the twin ends").unwrap();
    assert_eq!(cluster.primary().await, Some(0), "the first of that name goes on");
    assert_eq!(cluster.members[0].postmaster(), postmaster);
    assert_eq!(writer.errors(cluster.started), (0, Default::default()));
    ends_with_another_identity(cluster, writer).await;
}

/// The directory belongs to another cluster than the one in the store.
async fn ends_with_another_identity(mut cluster: Cluster, mut writer: Writer) {
    writer.stop().await;
    cluster.stop_member(0).await.unwrap();
    let mut client = etcd_client::Client::connect(cluster.etcd.endpoints(), None).await.unwrap();
    let key = format!("/pgvigil/{}/init", cluster.name);
    client.put(key, "{\"v\":1,\"system_identifier\":\"4711\"}", None).await.unwrap();
    let pg = cluster.members[0].directory.join("pg");
    let before = listing(&pg);
    cluster.start_agent(0).unwrap();
    let said = until_status(&cluster, 0, "a wrong cluster", |status| rule(status) == "identity.refused").await;
    println!("wrong cluster: {}", reason(&said));
    assert!(reason(&said).contains("4711") && reason(&said).contains("wrong"), "{}", reason(&said));
    assert_eq!(cluster.members[0].postmaster(), None, "not started");
    cluster.stop_member(0).await.unwrap();
    assert_eq!(listing(&pg), before);
    leaves_nothing(cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_of_postgresql_is_named() {
    let mut cluster = Cluster::prepare(small()).unwrap();
    let taken = TcpListener::bind(("127.0.0.1", cluster.members[0].port)).unwrap();
    cluster.start_agent(0).unwrap();
    let words = format!("port {} of 127.0.0.1 is in use by another program: stop it", cluster.members[0].port);
    until("the port in the log", async || {
        let log = std::fs::read_to_string(cluster.members[0].agent_log()).unwrap_or_default();
        log.lines().find(|line| line.contains("WARN") && line.contains(&words)).map(|line| println!("port: {line}"))
    })
    .await;
    assert_eq!(cluster.primary().await, None);
    drop(taken);
    // The mistake is mended: no further step is needed.
    cluster.healthy(PATIENCE).await.unwrap();
    leaves_nothing(cluster).await;
}

/// A whole cluster of one ordinary user: agents, guardians, PostgreSQL and etcd, without any right of root.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_user_runs_a_whole_cluster() {
    if !nix::unistd::geteuid().is_root() {
        // Then every other test of this file runs as one.
        return;
    }
    let user = nix::unistd::User::from_name("postgres").unwrap().expect("PostgreSQL is installed");
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    // The build's directory may be closed to others.
    let binary = home.path().join("pgvigil");
    std::fs::copy(BINARY, &binary).unwrap();
    let parent = home.path().join("clusters");
    std::fs::create_dir(&parent).unwrap();
    chown(&parent, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    let command = || {
        let mut command = tokio::process::Command::new("setpriv");
        command
            .args(["--reuid=postgres", "--regid=postgres", "--init-groups"])
            .arg(&binary)
            .arg("demo")
            .env("TMPDIR", &parent)
            .current_dir("/")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    };
    let log = std::fs::File::create(home.path().join("demo.log")).unwrap();
    let mut demo = command().stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    let order = async |words: &[&str]| {
        let output = command().args(words).output();
        let output = tokio::time::timeout(PATIENCE, output).await.expect("the demo answers").unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let primary = |said: &str| said.lines().find(|line| line.contains("primary")).map(str::to_owned);
    let said = until("a primary", async || Some(order(&["status"]).await).filter(|said| primary(said).is_some())).await;
    println!("{said}");
    let said = order(&["kill", "primary"]).await;
    println!("{said}");
    let said =
        until("another primary", async || Some(order(&["status"]).await).filter(|said| primary(said).is_some())).await;
    println!("{said}");
    order(&["quit"]).await;
    let ended = tokio::time::timeout(PATIENCE, demo.wait()).await.expect("the demo ends").unwrap();
    let log = std::fs::read_to_string(home.path().join("demo.log")).unwrap();
    assert!(ended.success(), "{log}");
    assert_eq!(std::fs::read_dir(&parent).unwrap().count(), 0, "nothing is left behind: {log}");
}
