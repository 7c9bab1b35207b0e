<?php
// The steps of a scenario, as step.go describes them.

error_reporting(E_ALL);
// A warning or a notice of the client is a failure of the step. What is only deprecated in PHP 8.2 is not: predis 1.1 is older.
set_error_handler(function ($no, $what) {
    if ($no & (E_DEPRECATED | E_USER_DEPRECATED)) {
        return true;
    }
    throw new RuntimeException($what);
});

const BOUND = 10.0; // seconds

[, $host, $port] = $argv;
$port = (int) $port;

// Runs all steps, also when one has failed, and ends the program.
function run(array $steps): never
{
    $code = 0;
    foreach ($steps as $name => $step) {
        try {
            $step();
            echo "ok $name\n";
        } catch (Throwable $e) {
            echo "failed $name: ", strtr(get_class($e) . ': ' . $e->getMessage(), "\r\n", '  '), " (line {$e->getLine()})\n";
            $code = 1;
        }
    }
    exit($code);
}

// Asks the test to restart the server and returns when it listens again.
function restart(): void
{
    echo "restart\n";
    equal('the restart', fgets(STDIN), "done\n");
}

function fail(string $why): never
{
    throw new RuntimeException($why);
}

function equal(string $what, $got, $want): void
{
    if ($got !== $want) {
        fail("$what: got " . var_export($got, true) . ', want ' . var_export($want, true));
    }
}

function contains(string $what, string $s, string $part): void
{
    if (!str_contains($s, $part)) {
        fail("$what: '$s' lacks '$part'");
    }
}

// Waits for what another connection does to be seen.
function until(string $what, callable $done): void
{
    for ($end = microtime(true) + BOUND; !$done();) {
        if (microtime(true) > $end) {
            fail("it never happened: $what");
        }
        usleep(5000);
    }
}

// Starts this program a second time, to play the role of another client while this one waits. Returns a function that waits
// for its end.
function other(string $role): callable
{
    global $argv;
    $pipes = [];
    $p = proc_open([PHP_BINARY, $argv[0], $argv[1], $argv[2], $argv[3], $role], [2 => ['pipe', 'w']], $pipes);
    return function () use ($p, $pipes, $role) {
        $said = stream_get_contents($pipes[2]);
        equal("the other client's exit code: $said", proc_close($p), 0);
    };
}

// Plays the role that other() asked for, if it did.
function play(array $roles): void
{
    global $argv;
    if (!isset($argv[4])) {
        return;
    }
    try {
        $roles[$argv[4]]();
        exit(0);
    } catch (Throwable $e) {
        fwrite(STDERR, $e->getMessage());
        exit(1);
    }
}
