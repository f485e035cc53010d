//go:build unix

package broker

// This file owns the program under "run": its environment, its signals and its
// exit status. What must stay true: the child's environment has the placeholder
// and no way to Vault.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Exit statuses: the broker's own, and a shell's for a program that cannot be
// started.
const (
	exitFailed        = 1
	exitNotExecutable = 126
	exitNotFound      = 127
)

var passedSignals = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

// unwanted are variables that would lead around the broker: to another key, to
// another organization or project, or to other headers. VAULT_* and BAO_* go too.
var unwanted = []string{
	"OPENAI_ADMIN_KEY", "OPENAI_ADMIN_API_KEY", "OPENAI_ORG_ID", "OPENAI_ORGANIZATION", "OPENAI_PROJECT_ID", "OPENAI_PROJECT", "OPENAI_CUSTOM_HEADERS",
}

// variables are what a program needs to use the broker.
func variables(address, token string) map[string]string {
	return map[string]string{
		"OPENAI_API_KEY":            token,
		"CODEX_API_KEY":             token,
		"OPENAI_BASE_URL":           "http://" + address + "/v1",
		"OPENAI_API_BASE":           "http://" + address + "/v1", // LangChain, LlamaIndex
		"OPENAI_WEBSOCKET_BASE_URL": "ws://" + address + "/v1",
	}
}

// childEnv is an environment for a child.
func childEnv(parent []string, address, token string) []string {
	set := variables(address, token)
	set["OPENAI_AGENTS_DISABLE_TRACING"] = "1" // it would send the placeholder to OpenAI
	set["NO_PROXY"] = "127.0.0.1,localhost,::1"
	for _, entry := range parent {
		name, value, _ := strings.Cut(entry, "=")
		switch {
		case name == "OPENAI_AGENTS_DISABLE_TRACING":
			set[name] = value
		case strings.EqualFold(name, "NO_PROXY") && value != "":
			set["NO_PROXY"] += "," + value
		}
	}
	set["no_proxy"] = set["NO_PROXY"]
	env := slices.DeleteFunc(slices.Clone(parent), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		_, replaced := set[name]
		return replaced || strings.HasPrefix(name, "VAULT_") || strings.HasPrefix(name, "BAO_") || slices.Contains(unwanted, name)
	})
	for name, value := range set {
		env = append(env, name+"="+value)
	}
	return env
}

// Env writes what a shell needs to use a running broker. It fails if none listens at the
// address: a file of an earlier run is no proof, and health checks run this command.
func Env(w io.Writer, address, tokenFile string) error {
	token, err := readFile(tokenFile, 0o077)
	if err != nil {
		return err
	}
	if !tokenForm.MatchString(token) {
		return fmt.Errorf("%s is not the token file of an agent", tokenFile)
	}
	conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(context.Background(), "tcp", address)
	if err != nil {
		return fmt.Errorf("no broker listens at %s: %w", address, err)
	}
	_ = conn.Close()
	set := variables(address, token)
	for _, name := range slices.Sorted(maps.Keys(set)) {
		fmt.Fprintf(w, "export %s='%s'\n", name, strings.ReplaceAll(set[name], "'", ""))
	}
	_, err = fmt.Fprintf(w, "export OPENAI_AGENTS_DISABLE_TRACING=1 NO_PROXY=\"127.0.0.1,localhost,::1${NO_PROXY:+,$NO_PROXY}\"\nunset %s\n", strings.Join(unwanted, " "))
	return err
}

// child is the program under "run".
type child struct {
	cmd      *exec.Cmd
	identity []string // variables of its account
}

// newChild finds the program and its account, before anything is leased.
func newChild(args []string, name string) (*child, int, error) {
	program, err := exec.LookPath(args[0])
	if errors.Is(err, os.ErrPermission) {
		return nil, exitNotExecutable, err
	} else if err != nil {
		return nil, exitNotFound, err
	}
	c := &child{cmd: exec.Command(program, args[1:]...)} //nolint:gosec,noctx // what the user asked for; signals end it
	c.cmd.Args[0] = args[0]
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.cmd.SysProcAttr = endWithParent()
	if name == "" {
		return c, 0, nil
	}
	u, credential, err := account(name)
	if err == nil && os.Geteuid() != 0 {
		err = fmt.Errorf("-user %s requires root", name)
	}
	if err != nil {
		return nil, exitFailed, err
	}
	c.cmd.SysProcAttr.Credential = credential
	c.identity = []string{"HOME=" + u.HomeDir, "USER=" + name, "LOGNAME=" + name}
	return c, 0, nil
}

func account(name string) (*user.User, *syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, nil, err
	}
	groups, err := u.GroupIds()
	number := func(id string) uint32 {
		n, wrong := strconv.ParseUint(id, 10, 32)
		err = errors.Join(err, wrong)
		return uint32(n)
	}
	c := &syscall.Credential{Uid: number(u.Uid), Gid: number(u.Gid)}
	for _, id := range groups {
		c.Groups = append(c.Groups, number(id))
	}
	return u, c, err
}

// start starts the program on a thread that lasts as long as the broker: the
// kernel ends the child with the thread that started it (see endWithParent).
func (c *child) start(address, token string) error {
	runtime.LockOSThread()
	c.cmd.Env = append(childEnv(os.Environ(), address, token), c.identity...)
	return c.cmd.Start()
}

// wait passes signals on until the program ends, and returns its exit status: a
// shell's, 128 and the signal's number, for one that a signal ended.
func (c *child) wait(signals <-chan os.Signal) int {
	ended := make(chan struct{})
	go func() {
		_ = c.cmd.Wait() // ProcessState says how it ended
		close(ended)
	}()
	for {
		select {
		case s := <-signals:
			if !fromTerminal(s) { // which the terminal sent to the child as well
				_ = c.cmd.Process.Signal(s) // it may have ended
			}
		case <-ended:
			if status, isWait := c.cmd.ProcessState.Sys().(syscall.WaitStatus); isWait && status.Signaled() {
				return signalStatus(status.Signal())
			}
			return c.cmd.ProcessState.ExitCode()
		}
	}
}

// fromTerminal says whether a signal came from the keyboard, and so reached the
// whole group of the foreground, the child included.
func fromTerminal(s os.Signal) bool {
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return (s == syscall.SIGINT || s == syscall.SIGQUIT || s == syscall.SIGHUP) && err == nil && group == unix.Getpgrp()
}

func signalStatus(s os.Signal) int {
	number, _ := s.(syscall.Signal)
	return 128 + int(number)
}
