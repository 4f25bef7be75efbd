//! What a file of one core may say, and what comes of it.

use corelane::config::{Config, Main, load};
use corelane::reload::{Began, compare};

use super::{ROUTE, folder, good, inputs, lines, set};

/// The configuration with these files in `cores.d`, or what is wrong, without the folder's name.
fn with(main: &str, cores: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let (folder, path) = folder(&format!("{ROUTE}{main}"), cores);
    let mut inputs = inputs("");
    inputs.main = Main::File(path);
    let checked = load(&inputs);
    let cut = format!("{}/", folder.path().display());
    let lines = lines(&checked)
        .into_iter()
        .map(|line| line.replace(&cut, ""));
    match lines.collect::<Vec<_>>() {
        lines if lines.is_empty() => Ok(checked.config.unwrap()),
        lines => Err(lines),
    }
}

#[test]
fn a_core_has_a_cpu_a_node_an_address_and_limits_of_its_own() {
    let file = "[core]\ncpu = 3\nnuma_node = 1\nlisten = \"127.0.0.1:7001\"\nring_depth = 128\n\
                upstreams_max = 64\ninstances_max = 128\n";
    let config = with("[core]\ncpus = \"0-1\"\n", &[("1.toml", file)]).unwrap();
    let [first, second] = &config.cores[..] else {
        panic!("{:?}", config.cores);
    };
    assert_eq!((first.number, first.cpu), (0, 0));
    assert_eq!(
        (first.numa_node, first.listen, first.ring_depth),
        (None, None, 512)
    );
    assert_eq!((first.upstreams_max, first.instances_max), (16_384, 65_536));
    assert_eq!((second.number, second.cpu), (1, 3));
    assert_eq!(second.numa_node, Some(1));
    assert_eq!(second.listen, Some(([127, 0, 0, 1], 7_001).into()));
    assert_eq!((second.ring_depth, second.upstreams_max), (128, 64));
    assert_eq!(second.instances_max, 128);
    // The last CPU that is free of data cores.
    assert_eq!(config.control.cpu, 2);
}

#[test]
fn a_core_may_be_the_control_core() {
    let control = ("2.toml", "[core]\nrole = \"control\"\n");
    let config = with("[core]\ncpus = \"0-2\"\n", &[control]).unwrap();
    let cpus: Vec<usize> = config.cores.iter().map(|core| core.cpu).collect();
    assert_eq!((cpus, config.control.cpu), (vec![0, 1], 2));
    // One that is no data core anyway, on another CPU.
    let moved = ("9.toml", "[core]\nrole = \"control\"\ncpu = 3\n");
    let config = with("[core]\ncpus = \"0-2\"\n", &[moved]).unwrap();
    assert_eq!((config.cores.len(), config.control.cpu), (3, 3));
}

/// `[core]`, files of `cores.d/` by name, and what is said.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);

#[test]
fn what_does_not_go_together_is_said_where_it_stands() {
    let control = "[core]\nrole = \"control\"\n";
    let cases: [Case<'_>; 9] = [
        (
            "[control]\ncpu = 1\n",
            &[("2.toml", control)],
            "cores.d/2.toml:2:8: role = \"control\" on CPU 2, and [control] cpu is 1; \
             write only one of the two",
        ),
        (
            "",
            &[("2.toml", control), ("3.toml", control)],
            "cores.d/3.toml:2:8: role = \"control\" is another core's already; \
             write it in one file only",
        ),
        (
            "",
            &[("1.toml", "[core]\ncpu = 0\n")],
            "cores.d/1.toml:2:7: CPU 0 is another core's already; \
             write another cpu, or leave the core out of cpus",
        ),
        (
            "",
            &[("1.toml", "[core]\ncpu = 64\n")],
            "cores.d/1.toml:2:7: cpu is 64, which this process may not use (0-3); \
             write one of these, or \"last\"",
        ),
        (
            "",
            &[("1.toml", "[core]\nlisten = \"7000\"\n")],
            "cores.d/1.toml:2:10: listen is \"7000\", not IP:PORT; \
             write it like \"127.0.0.1:7001\"",
        ),
        (
            "[core]\ncpus = \"0\"\n",
            &[("0.toml", "[core]\nlisten = \"127.0.0.1:7000\"\n")],
            "cores.d/0.toml:2:10: every core has a listen of its own, so callers find none; \
             leave it out of one file at least",
        ),
        (
            "",
            &[("1.toml", "[core]\nrole = \"lane\"\n")],
            "cores.d/1.toml:2:8: ",
        ),
        (
            "[core]\nrole = \"control\"\n",
            &[],
            "corelane.toml:8:1: role is of one core; move it to cores.d/<n>.toml, n being the core",
        ),
        (
            "",
            &[("1.toml", "[core]\nring_depth = 100\n")],
            "cores.d/1.toml:2:14: ring_depth is 100, not a power of two; write 128 or 64",
        ),
    ];
    for (main, cores, says) in cases {
        let found = with(main, cores).unwrap_err();
        assert!(
            found.iter().any(|line| line.starts_with(says)),
            "{says}\n{found:#?}"
        );
    }
}

#[test]
fn a_flag_does_not_speak_of_one_core() {
    let mut inputs = inputs(ROUTE);
    inputs.overrides = vec![set("core.cpu", "1")];
    assert_eq!(
        lines(&load(&inputs)),
        ["flag --set core.cpu: cpu is of one core; \
          write it in cores.d/<n>.toml, n being the core"]
    );
    inputs.overrides = vec![set("core.numa_node", "0")];
    assert_eq!(good(&inputs).cores[3].numa_node, Some(0));
}

#[test]
fn a_core_that_runs_keeps_its_cpu_and_may_be_told_of_placing() {
    let old = with("", &[]).unwrap();
    // The same CPU, written; and what of placing may change.
    let file = "[core]\ncpu = 1\nbusy_poll_us = 20\n";
    let server = "[server]\nimbalance = \"least_connections\"\nsteering = \"cpu\"\n";
    let new = with(server, &[("1.toml", file)]).unwrap();
    let changed = compare(&old, &new, &Began::with(&old)).unwrap();
    let wanted = [
        "server.imbalance",
        "core[1].busy_poll_us",
        "server.steering",
    ];
    assert_eq!(changed, wanted);

    let cpus = "[core]\ncpus = \"0-1\"\n";
    let old = with(cpus, &[]).unwrap();
    let moved = with(cpus, &[("1.toml", "[core]\ncpu = 2\n")]).unwrap();
    let problems = compare(&old, &moved, &Began::with(&old)).unwrap_err();
    let [problem] = &problems[..] else {
        panic!("{problems:?}");
    };
    let says = "cores.d/1.toml:2:7: core 1 would be on CPU 2 in place of 1; \
                restart, or write cpu = 1 in its file";
    assert!(problem.to_string().ends_with(says), "{problem}");
    // Where the line has gone it is the place at which it stood.
    let problems = compare(&moved, &old, &Began::with(&moved)).unwrap_err();
    let says = "cores.d/1.toml:2:7: core 1 would be on CPU 1 in place of 2; ";
    assert!(problems[0].to_string().contains(says), "{problems:?}");
    let fewer = with("[core]\ncpus = \"0\"\n", &[]).unwrap();
    let problems = compare(&old, &fewer, &Began::with(&old)).unwrap_err();
    let says = "corelane.toml:8:8: data cores would be 0 in place of 0-1";
    assert!(problems[0].to_string().contains(says), "{problems:?}");
}
