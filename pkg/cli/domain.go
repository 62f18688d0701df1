package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// domainOptions say what a domain in this process is like.
type domainOptions struct {
	dir                           string
	ephemeral                     bool
	trustDomain, listen           string
	trustDomainGiven, listenGiven bool   // by the user, not by default
	serverYAML                    string // more of the server's configuration
	wit                           bool   // WIT-SVIDs, this time
}

// domain is a whole trust domain in this process: a server and an agent, with
// all their state in one directory.
type domain struct {
	app           *app
	dir           string
	trustDomain   spiffeid.TrustDomain
	alias         spiffeid.ID // parent of entries on this node, whatever the agent's ID
	server, agent config.Source
	notes         []string // for the user
	log           string   // path

	adminSocket, agentSocket, workloadSocket string

	// Known once it runs.
	admin   *admin
	address string // of the server, host:port
	agentID spiffeid.ID
}

const (
	// readyTimeout is how long server and agent may take to start.
	readyTimeout = 30 * time.Second
	// reuseTimeout is how long an agent with an identity of an earlier run may
	// take to be connected, before it gets a new one.
	reuseTimeout = 5 * time.Second
	// joinTTL is how long the agent may take to present its token.
	joinTTL = 5 * time.Minute
	// maxRejoins bounds how often within rejoinWindow an agent that lost its
	// identity is given a new one.
	maxRejoins   = 5
	rejoinWindow = time.Minute
	// maxLog is the size at which the log of an earlier run is put aside, in
	// bytes.
	maxLog = 16 << 20
)

// runDomain starts a domain and calls body once it is complete. It returns what
// body returned, or why the domain ended before; the domain is stopped by then.
// body's context ends when ctx does, or when the domain fails.
func (a *app) runDomain(ctx context.Context, o domainOptions, body func(context.Context, *domain) error) (err error) {
	d, err := a.prepareDomain(&o)
	if err != nil {
		return err
	}
	if o.ephemeral {
		defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	}
	lock, err := lockDir(d.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := d.configure(&o); err != nil {
		return err
	}
	logged, err := divertLog(d.log, a.err, a.errStyle)
	if err != nil {
		return err
	}
	defer logged()
	err = d.run(ctx, body)
	var quiet statusError
	var known *failure
	if err != nil && !o.ephemeral && ctx.Err() == nil && !errors.As(err, &quiet) && !errors.As(err, &known) {
		err = &failure{code: exitFailed, err: err, remedy: "The log is " + home(d.log) + "."}
	}
	return err
}

func (a *app) prepareDomain(o *domainOptions) (*domain, error) {
	d := &domain{app: a}
	var err error
	switch {
	case o.ephemeral:
		d.dir, err = os.MkdirTemp("", "hallmark-")
	case o.dir != "":
		d.dir, err = filepath.Abs(o.dir)
	default:
		d.dir, err = defaultDevDir()
	}
	if err != nil {
		return nil, fmt.Errorf("choose a directory: %w", err)
	}
	if n := len(d.dir) + len("/"+workloadSocket.dev); n > maxSocketPath {
		return nil, usageError(fmt.Errorf("the path of %s is %d bytes too long for sockets in it; choose a shorter --dir", d.dir, n-maxSocketPath))
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, &failure{code: exitFailed, err: fmt.Errorf("make the directory: %w", err), remedy: "Name another with --dir, or use --ephemeral."}
	}
	d.log = filepath.Join(d.dir, "hallmark.log")
	return d, nil
}

// lockDir keeps a second domain out of a directory. The lock ends with the
// process, however that ends.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		who := "another process"
		if text, err := io.ReadAll(io.LimitReader(f, 32)); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
				who = fmt.Sprintf("process %d", pid)
			}
		}
		return nil, &failure{code: exitFailed, err: fmt.Errorf("hallmark dev runs already in %s (%s)", home(dir), who),
			remedy: "Use that one, stop it, or start another with --dir DIR or --ephemeral, and --listen 127.0.0.1:0."}
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// configure reads the two configuration files, after writing those that are
// missing.
func (d *domain) configure(o *domainOptions) error {
	serverFile, agentFile := filepath.Join(d.dir, "server.yaml"), filepath.Join(d.dir, "agent.yaml")
	const head = "# Written by \"hallmark dev\", which reads it at each start: change what you like,\n" +
		"# or delete it to have the defaults again. \"hallmark %s run -c\" takes it too.\n"
	server := fmt.Sprintf(head+"trust_domain: %q\nlisten: %q\ndata_dir: %q\nadmin_socket: %q\n\nnode_attestors:\n  join_token: {}\n%s",
		"server", o.trustDomain, o.listen, filepath.Join(d.dir, "server"), filepath.Join(d.dir, serverSocket.dev), o.serverYAML)
	var err error
	if d.server, err = fileOr(serverFile, server); err != nil {
		return err
	}
	name, _ := d.server.Lookup("trust_domain")
	if d.trustDomain, err = spiffeid.TrustDomainFromString(name); err != nil {
		return d.server.Errorf("trust_domain", "%v", err)
	}
	if o.trustDomainGiven && o.trustDomain != name {
		return usageError(fmt.Errorf("%s is of trust domain %s, and that cannot be changed; use another --dir for %s", home(d.dir), name, o.trustDomain))
	}
	listen, _ := d.server.Lookup("listen")
	if o.listenGiven && o.listen != listen {
		d.server.Set = append(d.server.Set, config.Setting{Path: "listen", Value: o.listen, From: "--listen"})
		d.notes = append(d.notes, fmt.Sprintf("%s says listen: %s; --listen overrides it this time.", home(serverFile), listen))
		listen = o.listen
	}
	serverLine := fmt.Sprintf("server: %q", listen)
	if _, port, err := net.SplitHostPort(listen); err != nil || port == "0" {
		serverLine = "# server: it takes another port each time"
	}
	agent := fmt.Sprintf(head+"trust_domain: %q\n%s\ndata_dir: %q\nsocket: %q\nadmin_socket: %q\n\nworkload_attestors:\n  unix:\n    path: true\n",
		"agent", name, serverLine, filepath.Join(d.dir, "agent"), filepath.Join(d.dir, workloadSocket.dev), filepath.Join(d.dir, agentSocket.dev))
	if d.agent, err = fileOr(agentFile, agent); err != nil {
		return err
	}
	if o.wit {
		on := config.Setting{Path: "experimental.wit", Value: "true", From: "--wit"}
		d.server.Set, d.agent.Set = append(d.server.Set, on), append(d.agent.Set, on)
	}
	// The agent will be given the address that the server has then.
	checked := d.agent
	checked.Set = append(slices.Clone(checked.Set), config.Setting{Path: "server", Value: devListen, From: "hallmark dev"})
	if err := errors.Join(d.app.programs.CheckServer(d.server), d.app.programs.CheckAgent(checked)); err != nil {
		return err
	}
	for _, s := range []struct {
		src  config.Source
		key  string
		path *string
	}{
		{d.server, "admin_socket", &d.adminSocket}, {d.agent, "admin_socket", &d.agentSocket}, {d.agent, "socket", &d.workloadSocket},
	} {
		path, ok := s.src.Lookup(s.key)
		if !ok {
			return s.src.Errorf(s.key, "hallmark dev needs `%s` to be set", s.key)
		}
		if *s.path, err = filepath.Abs(path); err != nil {
			return err
		}
	}
	if d.alias, err = spiffeid.FromPath(d.trustDomain, "/dev"); err != nil {
		return err
	}
	if err := checkPort(listen); err != nil {
		return err
	}
	return d.dropOrphan()
}

// fileOr reads a configuration file, after writing it if it is missing.
func fileOr(path, text string) (config.Source, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := writeFile(path, []byte(text), 0o600); err != nil {
			return config.Source{}, err
		}
	}
	return config.ReadFile(path)
}

// checkPort finds out before anything starts whether the port is free.
func checkPort(address string) error {
	l, err := net.Listen("tcp", address)
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return &failure{code: exitFailed, err: fmt.Errorf("cannot listen on %s: another program does", address),
			remedy: "Name another port with --listen, or any free one: --listen 127.0.0.1:0"}
	}
	return &failure{code: exitFailed, err: fmt.Errorf("cannot listen on %s: %w", address, err), remedy: "Name another address with --listen."}
}

// dropOrphan removes the identity of an agent whose server is gone: another
// server would not know it.
func (d *domain) dropOrphan() error {
	server, _ := d.server.Lookup("data_dir")
	if _, err := os.Stat(server); !errors.Is(err, fs.ErrNotExist) {
		return nil // there, or not ours to judge
	}
	if agent, ok := d.agent.Lookup("data_dir"); ok && agent == filepath.Join(d.dir, "agent") {
		if err := os.RemoveAll(agent); err != nil {
			return fmt.Errorf("remove the identity of an agent whose server is gone: %w", err)
		}
	}
	return nil
}

// divertLog sends what goes to os.Stderr to a file instead, and errors in it
// to the terminal as well. The function it returns ends that.
func divertLog(path string, terminal io.Writer, s style) (end func(), err error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("put the old log aside: %w", err)
		}
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open the log: %w", err)
	}
	stderr := os.Stderr
	os.Stderr = w
	var copying sync.WaitGroup
	copying.Go(func() {
		lines := bufio.NewReaderSize(r, 64<<10)
		for {
			line, err := lines.ReadSlice('\n') // a longer line comes in pieces
			_, _ = file.Write(line)            // a full disk must not stop the domain
			if text, ok := loggedError(string(line)); ok {
				fmt.Fprintf(terminal, "%s %s\n", s.red("hallmark:"), printable(text))
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
		}
	})
	return func() {
		os.Stderr = stderr
		w.Close()
		copying.Wait()
		r.Close()
		file.Close()
	}, nil
}

// loggedError returns what a line of the log says, if it is an error: without
// time and level, and the message without quotes.
func loggedError(line string) (string, bool) {
	line = strings.TrimSpace(line)
	if strings.Contains(line, `"level":"ERROR"`) {
		return line, true
	}
	_, text, ok := strings.Cut(line, "level=ERROR msg=")
	if !ok {
		return "", false
	}
	if quoted, err := strconv.QuotedPrefix(text); err == nil {
		if message, err := strconv.Unquote(quoted); err == nil {
			text = message + text[len(quoted):]
		}
	}
	return text, true
}

// program is a server or an agent that runs.
type program struct {
	name        string
	cancel      context.CancelFunc
	ready, done chan struct{}
	err         error // after done
}

// start runs a program until its stop, or until it fails. It outlives ctx,
// whose values it has: programs are stopped in order.
func start(ctx context.Context, name string, run func(ctx context.Context, ready func()) error) *program {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &program{name: name, cancel: cancel, ready: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = ended(ctx, run(ctx, sync.OnceFunc(func() { close(p.ready) })))
	}()
	return p
}

func (p *program) awaitReady(ctx context.Context) error {
	timer := time.NewTimer(readyTimeout)
	defer timer.Stop()
	select {
	case <-p.ready:
		return nil
	case <-p.done:
		return p.failure()
	case <-timer.C:
		return fmt.Errorf("the %s did not start within %v", p.name, readyTimeout)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// failure is why a program ended that nobody stopped.
func (p *program) failure() error {
	if p.err == nil {
		return fmt.Errorf("the %s ended unexpectedly", p.name)
	}
	return fmt.Errorf("%s: %w", p.name, p.err)
}

func (p *program) stop() error {
	p.cancel()
	<-p.done
	return p.err
}

// run starts server and agent, calls body, and stops them again.
func (d *domain) run(ctx context.Context, body func(context.Context, *domain) error) (err error) {
	server := start(ctx, "server", func(ctx context.Context, ready func()) error {
		return d.app.programs.RunServer(ctx, d.server, ready)
	})
	defer func() {
		if stopped := server.stop(); err == nil {
			err = stopped
		}
	}()
	if err := server.awaitReady(ctx); err != nil {
		return err
	}
	conn, err := dialUnix(d.adminSocket, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	d.admin = &admin{ClientConn: conn, trustDomain: d.trustDomain}
	info, err := d.admin.server().GetServer(ctx, &hallmarkv1.GetServerRequest{})
	if err != nil {
		return rpcError("ask the server for its address", err)
	}
	d.address = info.Address

	agent, err := d.startAgent(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if stopped := agent.stop(); err == nil {
			err = stopped
		}
	}()

	working, cancel := context.WithCancel(ctx)
	finished := make(chan error, 1)
	go func() { finished <- body(working, d) }()
	defer cancel()
	var rejoined []time.Time
	for {
		select {
		case err := <-finished:
			return err
		case <-server.done:
			cancel()
			<-finished
			return server.failure()
		case <-agent.done:
			// Its identity has ended: the machine slept longer than it lasts,
			// or the agent was evicted.
			cause := agent.failure()
			if rejoined, err = d.mayRejoin(ctx, rejoined); err == nil {
				agent, err = d.startAgent(ctx)
			}
			if err != nil {
				cancel()
				<-finished
				agent = &program{name: "agent", cancel: func() {}, done: closed()}
				if known := (*failure)(nil); errors.As(err, &known) {
					return err
				}
				return fmt.Errorf("%w (%w)", cause, err)
			}
			fmt.Fprintln(os.Stderr, "the agent had ended and joined anew:", cause)
		}
	}
}

func closed() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// mayRejoin decides whether an agent that ended may join anew: not if it was
// banned, and not without end.
func (d *domain) mayRejoin(ctx context.Context, before []time.Time) ([]time.Time, error) {
	now := d.app.now()
	recent := append(slices.DeleteFunc(before, func(t time.Time) bool { return now.Sub(t) > rejoinWindow }), now)
	if len(recent) > maxRejoins {
		return recent, fmt.Errorf("it ended %d times within %v", len(recent), rejoinWindow)
	}
	n, err := d.admin.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: wireID(d.agentID)})
	if err == nil && n.Banned {
		return recent, &failure{code: exitDenied, err: errors.New("the agent was banned, and dev ends with it"),
			remedy: "Start it again to bring in a new agent."}
	}
	return recent, nil
}

// startAgent runs the agent and ties the node's alias to its ID. An identity
// of an earlier run is used again; an agent without one that serves gets a
// join string.
//
// The string is only given to an agent that needs it: so the agent of a domain
// never changes its ID while it runs, which the alias would not follow.
func (d *domain) startAgent(ctx context.Context) (*program, error) {
	if entries, err := os.ReadDir(filepath.Join(d.dir, "agent")); err == nil && len(entries) > 0 {
		agent, err := d.tryAgent(ctx, "", reuseTimeout)
		if err == nil || ctx.Err() != nil {
			return agent, err
		}
		fmt.Fprintln(os.Stderr, "the agent's identity of an earlier run is of no use:", err)
		if err := os.RemoveAll(filepath.Join(d.dir, "agent")); err != nil {
			return nil, fmt.Errorf("remove the agent's old identity: %w", err)
		}
	}
	token, err := generateToken(ctx, d.admin, int32(joinTTL/time.Second), nil, d.address)
	if err != nil {
		return nil, err
	}
	return d.tryAgent(ctx, token.Join, readyTimeout)
}

func (d *domain) tryAgent(ctx context.Context, join string, within time.Duration) (*program, error) {
	src := d.agent
	src.Set = append(slices.Clone(src.Set), config.Setting{Path: "server", Value: d.address, From: "hallmark dev"})
	if join != "" {
		src.Set = append(src.Set, config.Setting{Path: "join", Value: join, From: "hallmark dev"})
	}
	agent := start(ctx, "agent", func(ctx context.Context, ready func()) error {
		return d.app.programs.RunAgent(ctx, src, ready)
	})
	err := agent.awaitReady(ctx)
	if err == nil {
		err = d.adopt(ctx, agent, within)
	}
	if err != nil {
		_ = agent.stop() // err says more
		return nil, err
	}
	return agent, nil
}

// adopt waits until the agent is connected and makes the alias name it.
func (d *domain) adopt(ctx context.Context, agent *program, within time.Duration) error {
	conn, err := dialUnix(d.agentSocket, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	client := hallmarkv1.NewAgentAdminServiceClient(conn)
	for {
		s, err := client.GetStatus(ctx, &hallmarkv1.GetStatusRequest{})
		if err == nil && s.Connected {
			if d.agentID, err = spiffeid.FromString(s.AgentId); err != nil {
				return fmt.Errorf("the agent's ID: %w", err)
			}
			old, err := d.ensureEntry(ctx, "dev-node", d.alias, d.agentID, "spiffe_id:"+s.AgentId)
			if err == nil && old != nil {
				d.forget(ctx, old.ParentId)
			}
			return err
		}
		timer := time.NewTimer(firstSVIDRetry)
		select {
		case <-timer.C:
		case <-agent.done:
			timer.Stop()
			return agent.failure()
		case <-ctx.Done():
			timer.Stop()
			if err != nil {
				return rpcError("ask the agent how it is", err)
			}
			return fmt.Errorf("the agent did not connect to the server within %v: %s", within, s.LastError)
		}
	}
}

// forget evicts the agent that this one took the place of, unless it was
// banned. That it stays listed otherwise does no harm.
func (d *domain) forget(ctx context.Context, id *types.SPIFFEID) {
	n, err := d.admin.agents().GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
	if err == nil && !n.Banned {
		_, err = d.admin.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id})
	}
	if err != nil && status.Code(err) != codes.NotFound {
		fmt.Fprintln(os.Stderr, "the former agent could not be evicted:", err)
	}
}

// ensureEntry makes an entry be as given, whether it exists or not. It returns
// the former one if that had to be changed.
func (d *domain) ensureEntry(ctx context.Context, id string, who, parent spiffeid.ID, selector string) (*types.Entry, error) {
	typ, value, _ := strings.Cut(selector, ":")
	want := &types.Entry{
		Id: id, SpiffeId: wireID(who), ParentId: wireID(parent),
		Selectors: []*types.Selector{{Type: typ, Value: value}},
		// Nobody is the alias: it only gives its children a place.
		AdditionalAttributes: &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: who == d.alias},
	}
	what := "register " + who.String()
	have, err := d.admin.entries().GetEntry(ctx, &entryv1.GetEntryRequest{Id: id})
	switch {
	case status.Code(err) == codes.NotFound:
		resp, err := d.admin.entries().BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{want}})
		if err != nil {
			return nil, rpcError(what, err)
		}
		// A similar one of the user's own is as good.
		if s := firstStatus(resp.Results); s.GetCode() != int32(codes.OK) && s.GetCode() != int32(codes.AlreadyExists) {
			return nil, itemError(what, s.GetCode(), s.GetMessage())
		}
		return nil, nil
	case err != nil:
		return nil, rpcError(what, err)
	case idText(have.ParentId) == parent.String() && slices.Equal(selectorTexts(have.Selectors), []string{selector}):
		return nil, nil
	}
	resp, err := d.admin.entries().BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{
		Entries: []*types.Entry{want}, InputMask: &types.EntryMask{ParentId: true, Selectors: true},
	})
	if err != nil {
		return nil, rpcError(what, err)
	}
	if len(resp.Results) != 1 || resp.Results[0].GetStatus().GetCode() != int32(codes.OK) {
		return nil, fmt.Errorf("%s: %v", what, resp.Results)
	}
	return have, nil
}

func firstStatus(results []*entryv1.BatchCreateEntryResponse_Result) *types.Status {
	if len(results) == 0 {
		return &types.Status{Code: int32(codes.Internal), Message: "the server gave no result"}
	}
	return results[0].GetStatus()
}

func wireID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// userName is the current user's name with nothing that a SPIFFE ID may not
// hold, or the uid if it has none.
func userName() string {
	uid := strconv.Itoa(os.Getuid())
	u, err := user.LookupId(uid)
	if err != nil {
		return uid
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
			return r
		}
		return '-'
	}, u.Username)
	if strings.Trim(name, ".") == "" {
		return uid
	}
	return name
}
