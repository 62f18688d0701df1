package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Defaults of `hallmark dev`.
const (
	devTrustDomain = "example.org"
	devListen      = "127.0.0.1:8081"
)

const (
	// firstSVIDTimeout is how long the first SVID may take; it comes in
	// milliseconds unless something is wrong.
	firstSVIDTimeout = 15 * time.Second
	// firstSVIDRetry is how soon it is asked for again.
	firstSVIDRetry = 20 * time.Millisecond
	// childGrace is how long the command of `dev -- CMD` has to end after it
	// was told to.
	childGrace = 10 * time.Second
)

func (a *app) devCommand() *cobra.Command {
	var o domainOptions
	cmd := &cobra.Command{
		Use:   "dev [flags] [-- COMMAND ARGS...]",
		Short: "a trust domain on this machine, with an identity for you",
		Long: "Dev runs a server and an agent in one process and registers an identity for the\n" +
			"current user. State, configuration and sockets are in one directory, and are used\n" +
			"again the next time. With a command after --, it runs that inside and ends with it.",
		Example: "  hallmark dev\n  hallmark dev --ephemeral --listen 127.0.0.1:0\n  hallmark dev -- ./run-integration-tests",
		Args: func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) > 0 && at != 0 {
				return usageError(fmt.Errorf("unexpected argument %q; a command to run comes after --, as in \"hallmark dev -- %s\"", args[0], args[0]))
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.dir, "dir", "", "`DIR` for everything (default $XDG_STATE_HOME/hallmark/dev)")
	flags.BoolVar(&o.ephemeral, "ephemeral", false, "use a temporary directory, and remove it at the end")
	flags.StringVar(&o.trustDomain, "trust-domain", devTrustDomain, "`name` of the trust domain")
	flags.StringVar(&o.listen, "listen", devListen, "`HOST:PORT` of the server; port 0 is any free one")
	flags.BoolVar(&o.wit, "wit", false, "issue WIT-SVIDs too, which are experimental")
	exclusive(cmd, "dir", "ephemeral")
	_ = cmd.MarkFlagDirname("dir") // fails only for a flag that does not exist
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o.trustDomainGiven, o.listenGiven = flags.Changed("trust-domain"), flags.Changed("listen")
		ctx := cmd.Context()
		if len(args) > 0 {
			// The command decides when this ends; signals go to it.
			ctx = context.WithoutCancel(ctx)
		}
		started := a.now()
		return a.runDomain(ctx, o, func(ctx context.Context, d *domain) error {
			identity, err := d.addUser(ctx)
			if err != nil {
				return err
			}
			svid, err := d.firstSVID(ctx, identity)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				a.remark("hallmark: %s is yours, in %s", svid.ID, a.now().Sub(started).Round(time.Millisecond))
				return a.runInside(ctx, d, args)
			}
			a.welcome(d, svid, a.now().Sub(started))
			<-ctx.Done()
			fmt.Fprintf(a.out, "\n%s\n", a.style.dim("Stopping; state stays in "+home(d.dir)+"."))
			return nil
		})
	}
	return cmd
}

// addUser registers an identity for the user this process runs as.
func (d *domain) addUser(ctx context.Context) (spiffeid.ID, error) {
	name := userName()
	id, err := spiffeid.FromPath(d.trustDomain, "/user/"+name)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("name the identity of user %q: %w", name, err)
	}
	uid := os.Getuid()
	_, err = d.ensureEntry(ctx, fmt.Sprintf("dev-user-%d", uid), id, d.alias, fmt.Sprintf("unix:uid:%d", uid))
	return id, err
}

// firstSVID asks the Workload API for an identity until it is there, as a
// workload would.
func (d *domain) firstSVID(ctx context.Context, want spiffeid.ID) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, firstSVIDTimeout)
	defer cancel()
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(workloadAddress(d.workloadSocket)))
	if err != nil {
		return nil, fmt.Errorf("connect to the Workload API: %w", err)
	}
	defer client.Close()
	for {
		svids, err := client.FetchX509SVIDs(ctx)
		for _, s := range svids {
			if s.ID == want {
				return s, nil
			}
		}
		if err != nil && status.Code(err) != codes.PermissionDenied && status.Code(err) != codes.Unavailable {
			return nil, rpcError("fetch the first SVID", err)
		}
		timer := time.NewTimer(firstSVIDRetry)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			if err == nil {
				err = ctx.Err()
			}
			return nil, fmt.Errorf("the SVID of %s did not come within %v: %w", want, firstSVIDTimeout, err)
		}
	}
}

// welcome says what runs and what to do with it.
func (a *app) welcome(d *domain, svid *x509svid.SVID, took time.Duration) {
	s := a.style
	self := selfName()
	expires := svid.Certificates[0].NotAfter
	var b strings.Builder
	fmt.Fprintf(&b, "\n  %s %s\n\n", s.green("●"), s.bold("Hallmark is running")+s.dim(fmt.Sprintf("  after %v", took.Round(10*time.Millisecond))))
	det := details{style: s}
	det.addPainted("You are", s.bold, svid.ID.String())
	det.add("until", fmt.Sprintf("%s, %s; it renews itself", expires.Local().Format(time.TimeOnly), a.relative(expires)))
	b.WriteString(det.String())

	fmt.Fprintf(&b, "\n  In another terminal, for every program that speaks the SPIFFE Workload API:\n\n    %s\n",
		s.cyan("export SPIFFE_ENDPOINT_SOCKET="+workloadAddress(d.workloadSocket)))
	fmt.Fprintf(&b, "\n  Three things to try there:\n\n")
	tries := [][2]string{
		{self + " fetch x509", "that identity, and who vouches for it"},
		{self + " explain", "why a process has it"},
		{self + " demo mtls", "two services trust each other while keys rotate"},
	}
	for _, try := range tries {
		fmt.Fprintf(&b, "    %s%s%s\n", s.cyan(try[0]), strings.Repeat(" ", len(tries[0][0])-len(try[0])+3), s.dim(try[1]))
	}
	fmt.Fprintf(&b, "\n  %s\n", s.dim(fmt.Sprintf("Server %s · state and log in %s · Ctrl-C stops it", d.address, home(d.dir))))
	for _, n := range d.notes {
		fmt.Fprintf(&b, "  %s\n", s.yellow(n))
	}
	io.WriteString(a.out, b.String())
}

// runInside runs a command with the domain's sockets in its environment and
// returns its exit status as an error.
func (a *app) runInside(ctx context.Context, d *domain, args []string) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)

	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(),
		workloadapi.SocketEnv+"="+workloadAddress(d.workloadSocket),
		serverSocket.env+"="+d.adminSocket,
		agentSocket.env+"="+d.agentSocket)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, a.out, a.err
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = childGrace
	if err := cmd.Start(); err != nil {
		return &failure{code: exitFailed, err: fmt.Errorf("run %q: %w", args[0], err)}
	}
	// A terminal sends its interrupts to the command too; twice would be one
	// too many.
	interactive := term.IsTerminal(int(os.Stdin.Fd()))
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if interactive && (s == syscall.SIGINT || s == syscall.SIGQUIT) {
				continue
			}
			_ = cmd.Process.Signal(s) // it may have ended just now
		case err := <-exited:
			var exit *exec.ExitError
			switch {
			case err == nil:
				return nil
			case ctx.Err() != nil:
				return ctx.Err()
			case !errors.As(err, &exit):
				return fmt.Errorf("run %q: %w", args[0], err)
			}
			if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				return statusError(128 + int(ws.Signal())) // as shells have it
			}
			return statusError(exit.ExitCode())
		}
	}
}

// selfName is how the user calls this program.
func selfName() string {
	const name = "hallmark"
	found, err := exec.LookPath(name)
	if err == nil {
		if self, err := os.Executable(); err == nil && sameFile(found, self) {
			return name
		}
	}
	if strings.ContainsRune(os.Args[0], filepath.Separator) {
		return os.Args[0]
	}
	return name
}

func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// home shortens a path below the home directory.
func home(path string) string {
	dir, err := os.UserHomeDir()
	if err != nil || dir == "/" {
		return path
	}
	if rest, ok := strings.CutPrefix(path, dir+"/"); ok {
		return "~/" + rest
	}
	return path
}
