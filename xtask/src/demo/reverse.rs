//! The second stage: the same server behind the reception desk.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::{STAFF, balancer::Balancer, staff_line, start_server};
use crate::lab::{Lab, LabOptions, Proc, VIP};

/// The port that the example's backend listens on.
const PORT: u16 = 8080;

/// The name that the example's certificate is for.
const NAME: &str = "shop.example";

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
    let made =
        rcgen::generate_simple_self_signed([NAME.to_owned()]).context("a certificate cannot be made")?;
    std::fs::write(directory.join("shop.example.key"), made.signing_key.serialize_pem())?;
    let authority = directory.join("shop.example.pem");
    std::fs::write(&authority, made.cert.pem())?;
    std::fs::write(directory.join("staff.users"), staff_line(program)?)?;
    let balancer = Balancer::start(&lab, program, "2-reverse-proxy.toml", directory)?;
    let state = |wanted: &'static str| {
        balancer.wait_for(wanted, |backends| {
            backends.iter().any(|it| it.address == address.to_string() && it.state == wanted)
        })
    };
    state("healthy")?;
    println!("a server       {address}");
    println!(
        "Lobby          runs with examples/2-reverse-proxy.toml; its desk answers on {VIP}, ports 80 and 443\n"
    );

    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let plain = format!("http://{VIP}/");
    let mut secure = words(&format!("--resolve {NAME}:443:{VIP} --cacert"));
    secure.extend([authority.display().to_string(), format!("https://{NAME}/")]);
    let staff = |more: &str| {
        let arguments =
            format!("--include {more} --resolve {NAME}:443:{VIP} --cacert {} ", authority.display());
        words(&format!("{}https://{NAME}/staff/", arguments.replace("  ", " ")))
    };
    let known = {
        let mut arguments = vec!["--user".to_owned(), format!("{}:{}", STAFF.0, STAFF.1)];
        arguments.extend(staff(""));
        arguments
    };
    let redirected = words(&format!("--include --resolve {NAME}:80:{VIP} http://{NAME}/pay?x"));
    let json = vec!["--include".into(), "-H".into(), "Accept: application/json".into(), plain.clone()];
    let mut good = true;
    for scene in [
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
    println!("$ lb route list\n{}", balancer.command(&["route", "list"])?);
    let url = format!("https://{NAME}/pay");
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
