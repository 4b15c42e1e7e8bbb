//! What the desk can still do when it has given up everything. By itself: a thread that is confined stays so, and its user is
//! the whole process's.

use std::{fs::File, io, net::TcpStream, process::Command, thread};

use anyhow::Result;
use lb_userspace::proxy::confine::confine;

#[test]
fn no_file_is_opened_no_program_started_and_nothing_listened_on() -> Result<()> {
    // What is tried is possible before.
    let directory = tempfile::tempdir()?;
    let (there, new) = (directory.path().join("there"), directory.path().join("new"));
    File::create(&there)?;
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    assert!(Command::new("true").status()?.success());
    let confined = thread::spawn(move || -> io::Result<[(&str, io::Result<()>); 6]> {
        confine()?;
        Ok([
            ("reads", File::open(&there).map(drop)),
            ("writes", File::create(&new).map(drop)),
            ("removes", std::fs::remove_file(&there)),
            ("starts a program", Command::new("true").status().map(drop)),
            ("listens", std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
            ("calls a server", TcpStream::connect(address).map(drop)),
        ])
    });
    for (what, outcome) in confined.join().expect("it does not panic")? {
        match what {
            "calls a server" => assert!(outcome.is_ok(), "{what}: {outcome:?}"),
            _ => {
                let error = outcome.expect_err(what);
                assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM), "{what}: {error}");
            }
        }
    }
    Ok(())
}
