//! The command `lb` as a person or a program meets it. Nothing here needs root or a daemon.

use std::path::Path;

use assert_cmd::Command;

const GOOD: &str = r#"interfaces = ["eth0"]

[pools.web]
health = { http = "/healthz", interval = "1s" }
backends = [ { address = "10.0.0.11:8080" }, { address = "10.0.0.12:8080", weight = 2 } ]

[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
"#;

/// `lb` with a run directory where no daemon is.
fn lb(run_dir: &Path) -> Command {
    let mut command = Command::cargo_bin("lb").unwrap();
    command.env("LB_RUN_DIR", run_dir).env_remove("LB_LOG").env_remove("RUST_LOG");
    command
}

struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn document(directory: &Path, text: &str) -> std::path::PathBuf {
    let path = directory.join("lb.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn check_accepts_a_document_that_is_right() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), GOOD);
    let outcome = run(lb(directory.path()).arg("check").arg(&file));
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.out.contains("is right: 1 service, 1 pool, 2 backends"), "{}", outcome.out);
}

#[test]
fn check_names_each_mistake_with_its_place_and_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let wrong = GOOD.replace("pool = \"web\"", "pool = \"wbe\"").replace("weight = 2", "wieght = 2");
    let file = document(directory.path(), &wrong);
    let outcome = run(lb(directory.path()).arg("check").arg(&file));
    assert_eq!(outcome.code, Some(2));
    assert_eq!(outcome.out, "");
    let name = file.display();
    assert!(outcome.err.contains(&format!("{name}:5:")), "{}", outcome.err);
    assert!(outcome.err.contains("wieght"), "{}", outcome.err);
    assert!(outcome.err.contains(&format!("{name}:9:")), "{}", outcome.err);
    assert!(outcome.err.contains("2 mistakes"), "{}", outcome.err);
    assert!(!outcome.err.contains('\x1b'), "colours although nobody looks: {}", outcome.err);
}

#[test]
fn check_speaks_json_to_programs() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), &GOOD.replace("pool = \"web\"", "pool = \"wbe\""));
    let outcome = run(lb(directory.path()).args(["--json", "check"]).arg(&file));
    assert_eq!(outcome.code, Some(2));
    let complaints: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    let errors: Vec<_> =
        complaints.as_array().unwrap().iter().filter(|complaint| complaint["severity"] == "error").collect();
    assert_eq!(errors.len(), 1, "{complaints}");
    assert_eq!(errors[0]["line"], 9);
    assert!(!errors[0]["remedy"].as_str().unwrap().is_empty());
    let file = document(directory.path(), GOOD);
    let outcome = run(lb(directory.path()).args(["--json", "check"]).arg(&file));
    assert_eq!((outcome.code, outcome.out.trim()), (Some(0), "[]"));
}

#[test]
fn a_file_that_is_not_there_is_exit_code_2() {
    let directory = tempfile::tempdir().unwrap();
    let outcome = run(lb(directory.path()).args(["check", "/nonexistent/lb.toml"]));
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.err.contains("/nonexistent/lb.toml"), "{}", outcome.err);
}

#[test]
fn every_command_that_needs_the_daemon_says_so_and_ends_with_3() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), GOOD);
    let file = file.to_str().unwrap();
    let commands: &[&[&str]] = &[
        &["status"],
        &["status", "--watch"],
        &["reload"],
        &["apply", file],
        &["service", "list"],
        &["service", "show", "shop"],
        &["service", "add", "shop", "--listen", "203.0.113.10:80/tcp", "--pool", "web"],
        &["service", "remove", "shop"],
        &["pool", "list"],
        &["pool", "show", "web"],
        &["pool", "add", "web", "--backend", "10.0.0.11:80", "--http", "/"],
        &["pool", "remove", "web"],
        &["backend", "list"],
        &["backend", "list", "--pool", "web"],
        &["backend", "add", "web", "10.0.0.11:80"],
        &["backend", "remove", "web", "10.0.0.11:80"],
        &["backend", "drain", "web", "10.0.0.11:80", "--deadline", "30s"],
        &["backend", "resume", "web", "10.0.0.11:80"],
        &["backend", "weight", "web", "10.0.0.11:80", "3"],
        &["backend", "disable", "web", "10.0.0.11:80"],
        &["connections"],
        &["counters"],
    ];
    for arguments in commands {
        let outcome = run(lb(directory.path()).args(*arguments));
        assert_eq!(outcome.code, Some(3), "{arguments:?}: {}", outcome.err);
        assert!(outcome.err.contains("lb run --config"), "{arguments:?}: {}", outcome.err);
        assert_eq!(outcome.out, "", "{arguments:?}");
    }
}

#[test]
fn apply_refuses_a_bad_document_before_it_asks_anybody() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), "interfaces = 3\n");
    let outcome = run(lb(directory.path()).arg("apply").arg(&file));
    assert_eq!(outcome.code, Some(2), "{}", outcome.err);
    assert!(outcome.err.contains("lb.toml:1:"), "{}", outcome.err);
}

#[test]
fn wrong_words_are_exit_code_2_with_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, hint) in [
        (&["statsu"][..], "status"),
        (&["backend", "add", "web", "web.example:80"], "10.0.0.11:8080"),
        (&["service", "add", "shop", "--listen", "203.0.113.10:80", "--pool", "web"], "203.0.113.10:80/tcp"),
        (&["backend", "drain", "web", "10.0.0.11:80", "--deadline", "30"], "30s"),
        (&["run"], "--config"),
        (&["backend", "weight", "web", "10.0.0.11:80", "1001"], "0..=1000"),
        (&["explain", "198.51.100.7", "203.0.113.10:80/tcp"], "198.51.100.7:40000"),
        (&["run", "--config", "none.toml", "--log-level", "loud"], "no log level \"loud\""),
        (&[], "Run the daemon"),
    ] {
        let outcome = run(lb(directory.path()).args(arguments));
        assert_eq!(outcome.code, Some(2), "{arguments:?}: {}", outcome.err);
        assert!(outcome.err.contains(hint), "{arguments:?}: {}", outcome.err);
    }
}

#[test]
fn help_teaches_by_examples() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, example) in [
        (&["--help"][..], "lb backend drain web 10.0.0.11:8080 --deadline 5m"),
        (&["run", "--help"], "sudo lb run --config"),
        (&["service", "add", "--help"], "--listen 203.0.113.10:80/tcp --pool web"),
        (&["backend", "drain", "--help"], "--deadline 5m"),
        (&["doctor", "--help"], "sudo lb doctor"),
    ] {
        let outcome = run(lb(directory.path()).args(arguments));
        assert_eq!(outcome.code, Some(0));
        assert!(
            outcome.out.contains("EXAMPLES") && outcome.out.contains(example),
            "{arguments:?}: {}",
            outcome.out
        );
    }
    let outcome = run(lb(directory.path()).arg("--help"));
    assert!(outcome.out.contains("EXIT CODES"), "{}", outcome.out);
}

#[test]
fn completions_know_the_commands() {
    let directory = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let outcome = run(lb(directory.path()).args(["completions", shell]));
        assert_eq!(outcome.code, Some(0));
        assert!(outcome.out.contains("doctor") && outcome.out.contains("drain"), "{shell}");
    }
}

#[test]
fn doctor_finds_an_interface_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), &GOOD.replace("eth0", "lb-none0"));
    let outcome = run(lb(directory.path()).args(["--json", "doctor", "--config"]).arg(&file));
    assert_eq!(outcome.code, Some(1), "{}", outcome.err);
    let findings: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    let problem = findings
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| finding["message"].as_str().unwrap().contains("lb-none0"))
        .expect("the missing interface is not among the findings");
    assert_eq!(problem["verdict"], "problem");
    assert!(!problem["remedy"].as_str().unwrap().is_empty());
}

#[test]
fn a_document_may_come_by_standard_input() {
    let directory = tempfile::tempdir().unwrap();
    let outcome = run(lb(directory.path()).args(["check", "-"]).write_stdin(GOOD));
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    let outcome =
        run(lb(directory.path()).args(["check", "-"]).write_stdin(GOOD.replace("\"web\"", "\"wbe\"")));
    assert_eq!(outcome.code, Some(2), "{}", outcome.err);
    assert!(outcome.err.starts_with("-:9:8: error: "), "{}", outcome.err);
}

/// Of a mistake that has others for a consequence only the mistake is told.
#[test]
fn what_follows_from_a_mistake_is_not_told_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = document(directory.path(), &GOOD.replace("203.0.113.10:80/tcp", "203.0.113.10:99999/tcp"));
    let outcome = run(lb(directory.path()).arg("check").arg(&file));
    assert_eq!(outcome.err.matches("lb.toml:").count(), 1, "{}", outcome.err);
    assert!(outcome.err.contains("ports end at 65535"), "{}", outcome.err);
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    let program = assert_cmd::cargo::cargo_bin("lb");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(program);
    let output = command.args(["completions", "bash"]).stdout(writer).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}
