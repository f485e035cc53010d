// Command openai-broker lets a program use OpenAI without holding a key.
package main

import (
	_ "embed" // the help text
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	// Public CA certificates for systems without any, such as an image made
	// from scratch.
	_ "golang.org/x/crypto/x509roots/fallback"

	"vault-plugin-secrets-openai/broker"
)

//go:embed usage.txt
var usage string

func main() {
	status, err := start(os.Args[1:], os.Stdout, os.Stderr)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "openai-broker:", err)
	}
	os.Exit(status)
}

const wrongUsage = 2

// start returns the exit status: 2 for wrong usage, and for run the program's.
func start(args []string, out, errOut io.Writer) (status int, err error) {
	if len(args) == 0 {
		args = []string{""}
	}
	fs := flag.NewFlagSet(args[0], flag.ContinueOnError)
	fs.SetOutput(errOut)
	parse := func(synopsis string) bool {
		fs.Usage = func() {
			fmt.Fprintf(errOut, "Usage: openai-broker %s %s\n\n", fs.Name(), synopsis)
			fs.PrintDefaults()
		}
		if err = fs.Parse(args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
			status, err = wrongUsage, fmt.Errorf("run \"openai-broker %s -help\" to list the flags", fs.Name())
		}
		return err == nil
	}
	switch args[0] {
	case "run":
		config := broker.Flags(fs)
		if !parse("-role my-app [flags] -- program [arguments]") {
			return status, err
		}
		if fs.NArg() == 0 {
			return wrongUsage, errors.New("no program to run; write it after --, such as: openai-broker run -role my-app -- python agent.py")
		}
		return broker.Run(config, fs.Args(), slog.New(slog.NewTextHandler(errOut, &slog.HandlerOptions{Level: slog.LevelWarn})))
	case "serve":
		file := fs.String("config", "", "`file` with the configuration")
		if !parse("-config broker.json") {
			return status, err
		}
		if *file == "" || fs.NArg() > 0 {
			return wrongUsage, errors.New("serve takes -config broker.json and nothing else")
		}
		config, err := broker.Load(*file)
		if err != nil {
			return 1, err
		}
		return broker.Run(config, nil, slog.New(slog.NewTextHandler(errOut, nil)))
	case "env":
		listen := fs.String("listen", "", "`address` of the running broker")
		file := fs.String("token-file", "", "`file` with the placeholder of the agent")
		if !parse("-listen 127.0.0.1:8180 -token-file FILE") {
			return status, err
		}
		if *listen == "" || *file == "" || fs.NArg() > 0 {
			return wrongUsage, errors.New("env takes -listen and -token-file and nothing else")
		}
		if err := broker.Env(out, *listen, *file); err != nil {
			return 1, err
		}
		return 0, nil
	case "-version", "--version", "version":
		_, err = fmt.Fprintln(out, "openai-broker", broker.Version())
		return 0, err
	case "-h", "-help", "--help", "help":
		_, err = fmt.Fprint(out, usage)
		return 0, err
	}
	_, err = fmt.Fprint(errOut, usage)
	return wrongUsage, err
}
