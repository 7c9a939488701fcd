//! `pgvigil config check [FILE]`: reads the file as the agent does, then looks at what it names. Changes nothing.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::{Exit, Failure, say};
use crate::client::Client;
use crate::config::Config;

/// An etcd member that does not take a connection within this would be passed over by the agent as well.
const CONNECT: Duration = Duration::from_secs(2);

#[derive(clap::Subcommand)]
pub enum Command {
    /// Read a file as the agent does, then look at directories, programs, ports and etcd; changes nothing
    Check(Arguments),
}

#[derive(clap::Args)]
pub struct Arguments {
    /// Default: /etc/pgvigil/pgvigil.toml
    #[arg(env = "PGVIGIL_CONFIG")]
    file: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Finding {
    what: String,
    ok: bool,
    /// What was seen; for a problem with the remedy.
    found: String,
}

pub fn run(command: &Command) -> Result<Exit, Failure> {
    let Command::Check(arguments) = command;
    let path = super::config_path(arguments.file.as_ref());
    let config = Config::load(&path)?;
    let findings = look(&config);
    let ok = findings.iter().all(|f| f.ok);
    if arguments.json {
        let body = serde_json::json!({ "file": path, "ok": ok, "checks": findings });
        say(format_args!("{body:#}\n"));
    } else {
        say(format_args!("{} is valid: member {} of cluster {}\n", path.display(), config.name, config.cluster));
        for finding in &findings {
            let mark = if finding.ok { "ok     " } else { "PROBLEM" };
            say(format_args!("{mark}  {}: {}\n", finding.what, finding.found));
        }
    }
    Ok(if ok { Exit::Ok } else { Exit::Failed })
}

fn look(config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        data_directory(&config.postgresql.data_dir),
        writable_directory("state_dir", &config.state_dir),
        user(&config.postgresql.os_user),
    ];
    findings.extend(programs(config.postgresql.bin_dir.as_deref()));
    findings.push(port("api.listen", config.api.listen));
    findings.push(port("port of PostgreSQL", SocketAddr::from(([0, 0, 0, 0], config.postgresql.port))));
    findings.extend(config.etcd.endpoints.iter().map(|endpoint| etcd(endpoint)));
    findings
}

fn data_directory(path: &Path) -> Finding {
    let what = format!("postgresql.data_dir {}", path.display());
    let (ok, found) = match std::fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => match existing_parent(path) {
            Some(parent) => (true, format!("is not there; it will be made in {}", parent.display())),
            None => (false, "is not there; make its parent directory".to_owned()),
        },
        Err(error) => (false, format!("{error}; run as root or as the owner of the data")),
        Ok(mut entries) => match entries.next() {
            None => (true, "is empty: it will be cloned or initialised".to_owned()),
            Some(_) => match std::fs::read_to_string(path.join("PG_VERSION")) {
                Ok(version) => (true, format!("holds data of PostgreSQL {}", version.trim())),
                Err(_) => (
                    false,
                    "holds files, and no PG_VERSION among them: name an empty directory, or one with data".to_owned(),
                ),
            },
        },
    };
    Finding { what, ok, found }
}

fn writable_directory(name: &str, path: &Path) -> Finding {
    let what = format!("{name} {}", path.display());
    let Some(existing) = existing_parent(path) else {
        return Finding { what, ok: false, found: "has no parent directory; make it".to_owned() };
    };
    let writable = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK | nix::unistd::AccessFlags::X_OK);
    let (ok, found) = match writable {
        Ok(()) if existing == path => (true, "is there and can be written".to_owned()),
        Ok(()) => (true, format!("is not there; it will be made in {}", existing.display())),
        Err(error) => {
            (false, format!("{} cannot be written: {error}; give it to the agent's user", existing.display()))
        }
    };
    Finding { what, ok, found }
}

/// `path`, or the nearest directory above it that is there.
fn existing_parent(path: &Path) -> Option<&Path> {
    path.ancestors().find(|p| p.is_dir()).filter(|p| p.parent().is_some() || *p == path)
}

fn user(name: &str) -> Finding {
    let what = format!("postgresql.os_user {name}");
    if !nix::unistd::geteuid().is_root() {
        return Finding { what, ok: true, found: "not used: the agent does not run as root here".to_owned() };
    }
    let (ok, found) = match nix::unistd::User::from_name(name) {
        Ok(Some(user)) if user.uid.is_root() => {
            (false, "is root, and PostgreSQL does not run as root; name another".to_owned())
        }
        Ok(Some(user)) => (true, format!("uid {}", user.uid)),
        Ok(None) => (false, "does not exist; install PostgreSQL's package or make the user".to_owned()),
        Err(error) => (false, error.to_string()),
    };
    Finding { what, ok, found }
}

fn programs(bin_dir: Option<&Path>) -> Vec<Finding> {
    let Some(bin_dir) = bin_dir.map(Path::to_owned).or_else(newest_bin_dir) else {
        return vec![Finding {
            what: "postgresql.bin_dir".to_owned(),
            ok: false,
            found: "no PostgreSQL was found under /usr/lib/postgresql or /usr/pgsql-*; install its server package"
                .to_owned(),
        }];
    };
    ["postgres", "initdb", "pg_basebackup", "pg_rewind", "pg_controldata", "pg_waldump"]
        .iter()
        .map(|program| {
            let path = bin_dir.join(program);
            let executable = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.mode() & 0o111 != 0);
            Finding {
                what: program.to_string(),
                ok: executable,
                found: match executable {
                    true => path.display().to_string(),
                    false => format!(
                        "{} is not there; correct postgresql.bin_dir or install the server package",
                        path.display()
                    ),
                },
            }
        })
        .collect()
}

/// Debian's and Red Hat's directories, the newest version first.
pub fn newest_bin_dir() -> Option<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let version = entry.file_name().to_str().and_then(|n| n.strip_prefix(prefix)).and_then(|v| v.parse().ok());
            let bin = entry.path().join("bin");
            if let Some(version) = version.filter(|_| bin.join("postgres").is_file()) {
                found.push((version, bin));
            }
        }
    }
    found.into_iter().max_by_key(|(version, _)| *version).map(|(_, bin)| bin)
}

fn port(name: &str, address: SocketAddr) -> Finding {
    let what = format!("{name} {address}");
    let (ok, found) = match TcpListener::bind(address) {
        Ok(_) => (true, "is free".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            (true, "is in use: right if the agent runs already, else stop what holds it (`ss -ltnp`)".to_owned())
        }
        Err(error) => (false, format!("{error}; take another address")),
    };
    Finding { what, ok, found }
}

/// Without encryption the version is asked for, so that another program on that port is told from etcd.
fn etcd(endpoint: &str) -> Finding {
    let what = format!("etcd {endpoint}");
    let bad = |found: String| Finding { what: what.clone(), ok: false, found };
    let address = endpoint.split("://").nth(1).unwrap_or(endpoint).trim_end_matches('/');
    let addresses: Vec<SocketAddr> = match address.to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return bad(format!("{error}; correct etcd.endpoints or the name service")),
    };
    let mut last = "has no address".to_owned();
    for address in addresses {
        // Dropped at once: the connection that asks is its own.
        match TcpStream::connect_timeout(&address, CONNECT).map(drop) {
            Ok(()) if endpoint.starts_with("https://") => {
                return Finding { what, ok: true, found: "takes connections (not asked further: TLS)".to_owned() };
            }
            Ok(()) => return etcd_version(what, endpoint),
            Err(error) => last = error.to_string(),
        }
    }
    bad(format!("{last}; is etcd running there, and its port open?"))
}

fn etcd_version(what: String, endpoint: &str) -> Finding {
    let base = endpoint.trim_end_matches('/');
    let ask = async { Client::of(Vec::new()).look(base, "/version", CONNECT).await };
    let answer = super::runtime().ok().and_then(|runtime| runtime.block_on(ask));
    let version = answer.as_ref().and_then(|(_, body)| body.get("etcdserver")?.as_str());
    match version {
        Some(version) => Finding { what, ok: true, found: format!("answers, version {version}") },
        None => {
            let found = "takes connections, and does not answer as etcd does; is it etcd's client port, or does it want https://?";
            Finding { what, ok: false, found: found.to_owned() }
        }
    }
}
