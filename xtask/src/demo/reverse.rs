//! The second stage: the same server behind the reception desk.

use std::{path::Path, time::Duration};

use anyhow::Result;

use super::{DESK, STAFF, balancer::Balancer, furnish_desk, start_server};
use crate::lab::{Lab, LabOptions, Proc, VIP};

/// The port that the example's backend listens on.
const PORT: u16 = 8080;

/// Something that is shown: what curl is told, and what its answer must have.
struct Scene<'a> {
    title: &'a str,
    arguments: Vec<String>,
    wanted: &'a [&'a str],
}

/// Shows requests by TLS and without, routes, and a room that closes and opens; whether curl saw all of it.
pub(super) fn show(program: &Path, directory: &Path) -> Result<bool> {
    let lab = Lab::new(LabOptions { backends: 1, ..LabOptions::default() })?;
    let address = (lab.backend_v4(0), PORT).into();
    let start = || start_server(&lab.backends[0], "1", address, &directory.join("server-1"), 50, 1000);
    let server = start()?;
    let authority = furnish_desk(program, directory)?;
    let (desk, name) = DESK;
    let balancer = Balancer::start(&lab, program, "2-reverse-proxy.toml", directory)?;
    let state = |wanted: &'static str| {
        balancer.wait_for(wanted, |backends| {
            backends.iter().any(|it| it.address == address.to_string() && it.state == wanted)
        })
    };
    state("healthy")?;
    println!("a server       {address}");
    println!(
        "Lobby          runs with examples/2-reverse-proxy.toml; its desk answers on {desk}, ports 80 and 443\n"
    );

    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let plain = format!("http://{desk}/");
    let mut secure = words(&format!("--resolve {name}:443:{desk} --cacert"));
    secure.extend([authority.display().to_string(), format!("https://{name}/")]);
    let staff = |more: &str| {
        let arguments =
            format!("--include {more} --resolve {name}:443:{desk} --cacert {} ", authority.display());
        words(&format!("{}https://{name}/staff/", arguments.replace("  ", " ")))
    };
    let known = {
        let mut arguments = vec!["--user".to_owned(), format!("{}:{}", STAFF.0, STAFF.1)];
        arguments.extend(staff(""));
        arguments
    };
    let redirected = words(&format!("--include --resolve {name}:80:{desk} http://{name}/pay?x"));
    let json = vec!["--include".into(), "-H".into(), "Accept: application/json".into(), plain.clone()];
    let mut good = true;
    for scene in [
        Scene {
            title: "The server answers at the address of before, packet by packet",
            arguments: vec![format!("http://{VIP}/")],
            wanted: &["server 1"],
        },
        Scene {
            title: "The server answers, by way of the desk",
            arguments: vec![plain.clone()],
            wanted: &["server 1"],
        },
        Scene { title: "The same with TLS, by the shop's name", arguments: secure, wanted: &["server 1"] },
        Scene {
            title: "Who calls the name without TLS is sent there",
            arguments: redirected,
            wanted: &["308", "location: https://shop.example/pay?x"],
        },
        Scene {
            title: "The staff's door asks who is there",
            arguments: staff("-H Accept:application/json"),
            wanted: &["401", "www-authenticate: Basic realm=\"the staff\"", "no_credentials"],
        },
        Scene { title: "Who is known comes in", arguments: known, wanted: &["200", "server 1"] },
        Scene {
            title: "A route of the desk's own",
            arguments: vec![format!("{plain}healthz")],
            wanted: &["There is nothing here."],
        },
        Scene {
            title: "A path that could be read in two ways goes nowhere",
            arguments: vec!["--path-as-is".into(), format!("{plain}x/..%2fhealthz")],
            wanted: &["cannot be understood"],
        },
    ] {
        good &= play(&lab, &scene)?;
    }
    // The desk says each second what it has counted.
    std::thread::sleep(Duration::from_millis(1200));
    println!("$ lb route list\n{}", balancer.command(&["route", "list"])?);
    let url = format!("https://{name}/pay");
    println!("$ lb route explain {url}\n{}", balancer.command(&["route", "explain", &url])?);

    drop(server);
    state("unhealthy")?;
    good &= play(
        &lab,
        &Scene {
            title: "The server is killed: the room is closed, and the desk says so",
            arguments: json,
            wanted: &["503", "retry-after: 5", "no_backend"],
        },
    )?;
    let server: Proc = start()?;
    state("healthy")?;
    let again = Scene { title: "It is back", arguments: vec![plain], wanted: &["server 1"] };
    good &= play(&lab, &again)?;
    println!("$ lb desk status\n{}", balancer.command(&["desk", "status"])?);
    drop(server);
    match good {
        true => println!("All answers were as they should be."),
        false => println!("Not all answers were as they should be.\n{}", balancer.last_words()),
    }
    Ok(good)
}

fn play(lab: &Lab, scene: &Scene<'_>) -> Result<bool> {
    println!("{}:", scene.title);
    let quoted = |argument: &String| match argument.contains(' ') {
        true => format!("'{argument}'"),
        false => argument.clone(),
    };
    println!("$ curl {}", scene.arguments.iter().map(quoted).collect::<Vec<_>>().join(" "));
    let fixed = ["--silent", "--show-error", "--max-time", "5"];
    let output = lab.client.command("curl").args(fixed).args(&scene.arguments).output()?;
    let answer = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{}\n", answer.trim_end());
    Ok(output.status.success() && scene.wanted.iter().all(|wanted| answer.contains(wanted)))
}
