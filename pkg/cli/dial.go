package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// socketKind is one of the three sockets that commands talk to.
type socketKind struct {
	what   string // who listens
	flag   string
	env    string
	system string // path of an installed one
	dev    string // name in the directory of `hallmark dev`
	start  string // commands that start one
}

var (
	serverSocket = socketKind{
		what: "server", flag: "admin-socket", env: "HALLMARK_ADMIN_SOCKET",
		system: "/run/hallmark/server.sock", dev: "admin.sock",
		start: `"hallmark dev" or "hallmark server run -c FILE"`,
	}
	agentSocket = socketKind{
		what: "agent", flag: "admin-socket", env: "HALLMARK_AGENT_SOCKET",
		system: "/run/hallmark/agent.sock", dev: "agent.sock",
		start: `"hallmark dev" or "hallmark agent run --join STRING"`,
	}
	workloadSocket = socketKind{
		what: "agent", flag: "socket", env: workloadapi.SocketEnv,
		system: "/run/hallmark/workload.sock", dev: "workload.sock",
		start: `"hallmark dev" or "hallmark agent run --join STRING"`,
	}
)

// Bounds of what a command waits for.
const (
	connectTimeout = 2 * time.Second  // a local socket answers at once or not at all
	callTimeout    = 30 * time.Second // of one call that has nothing to wait for
	maxMessage     = 64 << 20         // bytes; a page of entries can be large
)

// socketFlag gives a command the flag that names a socket.
func socketFlag(cmd *cobra.Command, kind socketKind) *string {
	path := new(string)
	cmd.Flags().StringVar(path, kind.flag, "", fmt.Sprintf("`PATH` of the %s's socket (default $%s, then the usual places)", kind.what, kind.env))
	_ = cmd.MarkFlagFilename(kind.flag, "sock") // fails only for a flag that does not exist
	return path
}

// found is where a socket is, or should be.
type found struct {
	address string   // a path, or tcp://host:port
	by      string   // the flag or variable that named it; empty if it was looked for
	others  []string // where else was looked, in vain
}

// find returns the address of a socket: what the flag says, else the
// environment, else the system's if it exists, else that of `hallmark dev`.
func (k socketKind) find(flag string) found {
	if flag != "" {
		return found{address: socketPath(flag), by: "--" + k.flag}
	}
	if env := os.Getenv(k.env); env != "" {
		return found{address: socketPath(env), by: "$" + k.env}
	}
	var candidates []string
	// A shell that was given a Workload API by `hallmark dev --dir` means the
	// sockets beside it too.
	if env := os.Getenv(workloadapi.SocketEnv); env != "" {
		candidates = append(candidates, filepath.Join(filepath.Dir(socketPath(env)), k.dev))
	}
	candidates = append(candidates, k.system)
	if dir, err := defaultDevDir(); err == nil {
		if path := filepath.Join(dir, k.dev); !slices.Contains(candidates, path) {
			candidates = append(candidates, path)
		}
	}
	for _, path := range candidates {
		if _, err := os.Stat(path); err == nil {
			return found{address: path}
		}
	}
	return found{address: candidates[0], others: candidates[1:]}
}

// socketPath takes the path out of a unix: URL; anything else stays.
func socketPath(address string) string {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return strings.TrimPrefix(path, "//")
	}
	return address
}

// isURI reports whether an address of a socket is one, and no path.
func isURI(address string) bool {
	return strings.HasPrefix(address, "unix:") || strings.Contains(address, "://")
}

// checkEndpoint checks the form of a Workload API's address (Workload Endpoint
// §4). A path is one too for our own commands.
func checkEndpoint(address string) error {
	if !isURI(address) {
		return nil
	}
	err := workloadapi.ValidateAddress(address)
	if rest, ok := strings.CutPrefix(address, "unix://"); ok && err == nil && !strings.HasPrefix(rest, "/") {
		err = errors.New("a unix address names no host")
	}
	return err
}

// reach opens a connection to the socket, or fails with a reason. There is
// none for a TCP address.
func (k socketKind) reach(ctx context.Context, flag string) (string, net.Conn, error) {
	at := k.find(flag)
	if named := cmp.Or(flag, os.Getenv(k.env)); k.env == workloadapi.SocketEnv {
		if err := checkEndpoint(named); err != nil {
			return "", nil, usageError(fmt.Errorf("%s %q: %w; write unix:///PATH or tcp://ADDRESS:PORT", at.by, named, err))
		}
	}
	if strings.HasPrefix(at.address, "tcp://") {
		return at.address, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", at.address)
	if err != nil {
		return "", nil, k.unreachable(at, err)
	}
	return at.address, conn, nil
}

// unreachable says why nobody answers at a socket, and what to do.
func (k socketKind) unreachable(at found, err error) error {
	out := &failure{code: exitUnreachable, remedy: fmt.Sprintf("Start one with %s,\nor name its socket with --%s or $%s.", k.start, k.flag, k.env)}
	if len(at.others) > 0 && errors.Is(err, fs.ErrNotExist) {
		out.err = fmt.Errorf("no %s is running: there is neither %s nor %s", k.what, home(at.address), home(strings.Join(at.others, " nor ")))
		return out
	}
	why := err.Error()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		why = "there is no such socket"
	case errors.Is(err, syscall.ECONNREFUSED):
		why = "nobody listens on it; the " + k.what + " that made it is gone"
	case errors.Is(err, fs.ErrPermission):
		why = "this user may not open it"
		out.code = exitDenied
		if k.env != workloadSocket.env {
			out.remedy = "Only root and the user that the " + k.what + " runs as may administer it."
		}
	case len(at.address) > maxSocketPath:
		why = fmt.Sprintf("its path is longer than the %d bytes that the kernel allows", maxSocketPath)
	case errors.Is(err, context.DeadlineExceeded):
		why = "no answer in time"
	}
	by := ""
	if at.by != "" {
		by = " (" + at.by + ")"
	}
	out.err = fmt.Errorf("no %s at %s%s: %s", k.what, at.address, by, why)
	return out
}

// maxSocketPath is the length of sockaddr_un's path without its final zero.
const maxSocketPath = 107

// connect opens a connection to an admin socket.
func (k socketKind) connect(ctx context.Context, flag string) (*grpc.ClientConn, error) {
	address, conn, err := k.reach(ctx, flag)
	if err != nil {
		return nil, err
	}
	if conn == nil {
		return nil, usageError(fmt.Errorf("%s is no socket on this machine; the %s is administered from its own", address, k.what))
	}
	return dialUnix(address, conn)
}

// dialUnix makes a client of a socket. first is a connection to it that is
// open already; it may be nil.
func dialUnix(path string, first net.Conn) (*grpc.ClientConn, error) {
	opened := make(chan net.Conn, 1)
	if first != nil {
		opened <- first
	}
	conn, err := grpc.NewClient("passthrough:///localhost",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the kernel says who is at the other end
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case c := <-opened:
				return c, nil
			default:
				var d net.Dialer
				return d.DialContext(ctx, "unix", path)
			}
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil && first != nil {
		first.Close()
	}
	return conn, err
}

// workload opens a client of the Workload API.
func workload(ctx context.Context, flag string, options ...workloadapi.ClientOption) (*workloadapi.Client, error) {
	address, conn, err := workloadSocket.reach(ctx, flag)
	if err != nil {
		return nil, err
	}
	if conn != nil {
		conn.Close() // it was only to see whether someone is there
	}
	client, err := workloadapi.New(ctx, append(options, workloadapi.WithAddr(workloadAddress(address)))...)
	if err != nil {
		return nil, usageError(fmt.Errorf("connect to the Workload API at %s: %w", address, err))
	}
	return client, nil
}

func workloadAddress(address string) string {
	if strings.HasPrefix(address, "tcp://") {
		return address
	}
	if abs, err := filepath.Abs(address); err == nil {
		address = abs
	}
	return "unix://" + address
}

// defaultDevDir is where `hallmark dev` keeps its state.
func defaultDevDir() (string, error) {
	if state := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(state) {
		return filepath.Join(state, "hallmark", "dev"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the home directory: %w", err)
	}
	return filepath.Join(home, ".local", "state", "hallmark", "dev"), nil
}
