//! `pgvigil demo`: a cluster on this machine. Live, with keys; or `--once`, a script with a table; or an order for a demo
//! that runs in another terminal.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use comfy_table::{Table, presets};

use super::{Exit, Failure, say};
use crate::demo::figures::{Figure, measure};
use crate::demo::scenarios::{Outcome, Report, Scenario, Stage};
use crate::demo::{Cluster, DemoError, Options, control, live, probe};

#[derive(clap::Args)]
pub struct Arguments {
    /// Play all faults once without questions, print a table of what each of them cost, and end
    #[arg(long)]
    once: bool,
    /// With --once: the same as JSON, in a file or (no FILE) on standard output instead of the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", requires = "once")]
    json: Option<PathBuf>,
    /// Members with PostgreSQL, 1 to 9
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    members: u8,
    /// sync, strict or async
    #[arg(long, default_value = "sync", value_parser = ["sync", "strict", "async"])]
    durability: String,
    /// Keep files and logs after the end
    #[arg(long)]
    keep: bool,
    /// Directory for files (default: the system's for temporary files)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// For scripts/bench: measures on clusters of its own, prints JSON
    #[arg(long, hide = true, conflicts_with_all = ["once", "order"], value_parser = ["memory", "guardian", "freeze"])]
    figures: Option<String>,
    #[arg(long, hide = true, default_value_t = 10, requires = "figures", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// At rest, for `memory`
    #[arg(long, hide = true, default_value_t = 30, requires = "figures", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    #[arg(long, hide = true, requires = "figures")]
    no_real_time: bool,
    /// Block device with an empty file system, for `freeze`
    #[arg(long, hide = true, value_name = "DEVICE", requires = "figures", required_if_eq("figures", "freeze"))]
    disk: Option<PathBuf>,
    /// For scripts/compare: only the writers, against these servers (`name=address:port`), steered over standard input
    #[arg(long, hide = true, value_name = "SERVER", conflicts_with_all = ["once", "order", "figures"], value_parser = server)]
    probe: Vec<(String, SocketAddr)>,
    /// Order for a demo that runs in another terminal: `kill primary`, `switchover`, `help`, …
    #[arg(value_name = "ORDER")]
    order: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("start the runtime: {error}"), ""))?;
    if !arguments.order.is_empty() {
        let answer = runtime.block_on(control::order(arguments.dir.as_deref(), &arguments.order.join(" ")))?;
        say(format_args!("{answer}\n"));
        return Ok(Exit::Ok);
    }
    let options = Options {
        members: usize::from(arguments.members),
        durability: arguments.durability.clone(),
        parent: arguments.dir.clone(),
        keep: arguments.keep,
        ..Options::default()
    };
    if let Some(kind) = &arguments.figures {
        return runtime.block_on(figures(kind, arguments, options));
    }
    if !arguments.probe.is_empty() {
        runtime.block_on(probe::run(arguments.probe.clone()))?;
        return Ok(Exit::Ok);
    }
    if arguments.once {
        return runtime.block_on(once(arguments, options));
    }
    runtime.block_on(live::run(options))?;
    Ok(Exit::Ok)
}

fn server(text: &str) -> Result<(String, SocketAddr), String> {
    let wrong = || format!("`{text}` is not name=address:port");
    let (name, at) = text.split_once('=').ok_or_else(wrong)?;
    Ok((name.to_owned(), at.parse().map_err(|_| wrong())?))
}

impl From<DemoError> for Failure {
    fn from(error: DemoError) -> Failure {
        Failure::failed(error.to_string(), "")
    }
}

async fn once(arguments: &Arguments, options: Options) -> Result<Exit, Failure> {
    let cluster = Cluster::start(options).await?;
    let base = cluster.base.clone();
    // Ctrl-C and SIGTERM end the script, and nothing stays.
    let interrupted = live::interrupted().map_err(|error| Failure::failed(format!("wait for signals: {error}"), ""))?;
    progress(&format!("cluster {} in {}", cluster.name, base.display()));
    tokio::select! {
        // Dropped in the middle, `script` drops the cluster, which ends everything.
        report = script(cluster) => {
            let report = report?;
            write(arguments, &report)?;
            Ok(if report.ok() { Exit::Ok } else { Exit::Failed })
        }
        () = interrupted => Err(Failure::failed("interrupted", "")),
    }
}

async fn figures(kind: &str, arguments: &Arguments, options: Options) -> Result<Exit, Failure> {
    let figure = match (kind, &arguments.disk) {
        ("freeze", Some(disk)) => Figure::Freeze { runs: arguments.runs, disk: disk.clone() },
        ("guardian", _) => Figure::Guardian { runs: arguments.runs, real_time: !arguments.no_real_time },
        _ => Figure::Memory { over: Duration::from_secs(u64::from(arguments.seconds)) },
    };
    let interrupted = live::interrupted().map_err(|error| Failure::failed(format!("wait for signals: {error}"), ""))?;
    tokio::select! {
        // Dropped in the middle, it ends its cluster.
        measured = measure(figure, options) => {
            say(format_args!("{}\n", measured?));
            Ok(Exit::Ok)
        }
        () = interrupted => Err(Failure::failed("interrupted", "")),
    }
}

async fn script(cluster: Cluster) -> Result<Report, Failure> {
    let (mut stage, ready) = match Stage::set(cluster).await {
        Ok(set) => set,
        Err((error, mut cluster)) => {
            cluster.keep_files();
            cluster.shutdown().await;
            return Err(error.into());
        }
    };
    progress(&format!("ready after {:.1} s", ready.as_secs_f64()));
    let mut report = Report { ready_s: (ready.as_secs_f64() * 100.0).round() / 100.0, scenarios: Vec::new() };
    for scenario in Scenario::ALL {
        progress(&format!("… {}", scenario.name()));
        let outcome = stage.run(scenario).await;
        progress(&line(&outcome));
        report.scenarios.push(outcome);
    }
    let Stage { mut cluster, mut writer, .. } = stage;
    writer.stop().await;
    if !report.ok() {
        cluster.keep_files();
    }
    let (left, kept) = cluster.shutdown().await;
    if left > 0 {
        progress(&format!("{left} processes had to be killed at the end"));
    }
    if let Some(logs) = kept {
        progress(&format!("logs are in {}", logs.display()));
    }
    Ok(report)
}

/// For people who wait; JSON readers get the end only.
fn progress(text: &str) {
    eprintln!("{text}");
}

fn line(outcome: &Outcome) -> String {
    let verdict = if outcome.ok { "ok" } else { "FAILED" };
    format!(
        "  {verdict}: {:.0} ms without writes, {} errors. {}",
        outcome.write_outage_ms, outcome.errors, outcome.note
    )
}

fn write(arguments: &Arguments, report: &Report) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::failed(format!("write the report: {error}"), ""))?;
    match &arguments.json {
        Some(file) if file.as_os_str() == "-" => {
            say(format_args!("{json}\n"));
            return Ok(());
        }
        Some(file) => std::fs::write(file, format!("{json}\n"))
            .map_err(|error| Failure::failed(format!("write {}: {error}", file.display()), ""))?,
        None => {}
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["SCENARIO", "WRITE OUTAGE", "ERRORS", "LOST ROWS", "RESULT", ""]);
    for outcome in &report.scenarios {
        table.add_row([
            outcome.name.clone(),
            format!("{:.0} ms", outcome.write_outage_ms),
            outcome.errors.to_string(),
            outcome.lost_rows.to_string(),
            if outcome.ok { "ok".to_owned() } else { "FAILED".to_owned() },
            outcome.note.clone(),
        ]);
    }
    say(format_args!("\nready after {:.1} s\n\n{}\n", report.ready_s, table.trim_fmt()));
    Ok(())
}
