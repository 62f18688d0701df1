package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a question to a daemon.
const (
	askTime   = 4 * time.Second // less than an attestation may take
	maxAnswer = 4 << 20         // bytes; labels may be long
	maxError  = 300             // bytes of a daemon's error that are passed on
	maxIdle   = 4               // connections kept open
	idleTime  = time.Minute
)

// anyUser says that it does not matter who runs a daemon: its socket is where
// only root can put one.
const anyUser = -1

// daemon is the two questions that are asked of a container daemon. They are
// the same in every version of docker's API, so no version is named: daemons
// refuse those that are too old or too new for them.
type daemon struct {
	socket string
	user   int64 // who must run it, or anyUser
	client *http.Client
}

func newDaemon(socket string, user int64) *daemon {
	d := &daemon{socket: socket, user: user}
	d.client = &http.Client{
		Transport: &http.Transport{
			DialContext:         d.dial,
			DisableCompression:  true,
			MaxIdleConnsPerHost: maxIdle,
			IdleConnTimeout:     idleTime,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return d
}

// dial connects to the socket and makes sure that it is the right user's.
func (d *daemon) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", d.socket)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w; start the daemon, or take its attestor out of the configuration", err)
	}
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w; run the agent as root, or as a user who may use the socket", err)
	}
	if err != nil || d.user == anyUser {
		return c, err
	}
	if err := ranBy(c.(*net.UnixConn), d.user); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", d.socket, err)
	}
	return c, nil
}

// ranBy fails if the process at the other end of a connection is not a user's.
func ranBy(c *net.UnixConn, user int64) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if controlled := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); controlled != nil {
		return controlled
	}
	if err != nil {
		return fmt.Errorf("find out who listens: %w", err)
	}
	if int64(cred.Uid) != user {
		return fmt.Errorf("who listens there is user %d, not user %d", cred.Uid, user)
	}
	return nil
}

// containerInfo is what matters of a daemon's description of a container.
type containerInfo struct {
	ID    string `json:"Id"`
	Name  string // with a slash before it
	Image string // the image's ID
	State struct {
		Running bool
		PID     int32 `json:"Pid"` // in the daemon's PID namespace
	}
	Config struct {
		Image  string
		Labels map[string]string
		Env    []string
	}
}

// errNotFound says that a daemon has no such thing.
var errNotFound = errors.New("not found")

// container describes a container. It fails with errNotFound if there is none.
func (d *daemon) container(ctx context.Context, id string) (*containerInfo, error) {
	var info containerInfo
	if err := d.get(ctx, "/containers/"+url.PathEscape(id)+"/json", &info); err != nil {
		return nil, err
	}
	return &info, nil
}

// imageDigests returns what registries call an image: name@digest for each. It
// fails with errNotFound if there is no such image.
func (d *daemon) imageDigests(ctx context.Context, id string) ([]string, error) {
	var info struct{ RepoDigests []string }
	if err := d.get(ctx, "/images/"+url.PathEscape(id)+"/json", &info); err != nil {
		return nil, err
	}
	return info.RepoDigests, nil
}

func (d *daemon) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon"+path, nil)
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return errors.Unwrap(err) // without the URL, which means nothing to an operator
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read its answer: %w", err)
	case len(body) > maxAnswer:
		return fmt.Errorf("its answer is longer than %d bytes", maxAnswer)
	case resp.StatusCode == http.StatusNotFound:
		return errNotFound
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("it answered %s: %q", resp.Status, body[:min(len(body), maxError)])
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("read its answer: %w", err)
	}
	return nil
}
