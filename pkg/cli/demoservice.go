package cli

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sync/errgroup"
)

const (
	demoCallers  = 2                      // that call at once
	demoPace     = 8 * time.Millisecond   // of each; leaves the machine some air
	demoReport   = 100 * time.Millisecond // between two counts
	demoPatience = 5 * time.Second        // of one request
)

// demoService is what the processes of `demo mtls` run: an ordinary program
// that takes its identity from go-spiffe and nothing else.
func (a *app) demoService() *cobra.Command {
	return &cobra.Command{
		Use:     "service shop|stock [ADDRESS]",
		Short:   "one of the demo's services",
		Long:    "A service of \"hallmark demo mtls\", which starts it.",
		Example: "  hallmark demo mtls",
		Args:    arguments(1, 2, "a service"),
		Hidden:  true,
		RunE: func(cmd *cobra.Command, args []string) error {
			identify, identified := context.WithTimeout(cmd.Context(), demoStart)
			source, err := workloadapi.NewX509Source(identify)
			identified()
			if err != nil {
				return fmt.Errorf("get an identity: %w", err)
			}
			defer source.Close()
			svid, err := source.GetX509SVID()
			if err != nil {
				return err
			}
			s := &demoService{name: args[0], source: source, domain: svid.ID.TrustDomain(), out: json.NewEncoder(a.out)}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			go func() { // ends with the process at the latest
				_, _ = io.Copy(io.Discard, a.in)
				cancel()
			}()
			if args[0] == "stock" {
				return s.serve(ctx)
			}
			if len(args) < 2 {
				return usageError(errors.New("which address does it call?"))
			}
			return s.call(ctx, args[1])
		},
	}
}

// demoService is one of the two.
type demoService struct {
	name   string
	source *workloadapi.X509Source
	domain spiffeid.TrustDomain

	mu  sync.Mutex
	out *json.Encoder
}

func (s *demoService) tell(e demoEvent) {
	e.Service = s.name
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.out.Encode(e) // the demo may be gone; then this ends soon
}

// follow tells of each SVID.
func (s *demoService) follow(ctx context.Context) error {
	last := ""
	for {
		svid, err := s.source.GetX509SVID()
		if err != nil {
			return err
		}
		if serial := svid.Certificates[0].SerialNumber.String(); serial != last {
			last = serial
			s.tell(demoEvent{Authority: hex.EncodeToString(svid.Certificates[len(svid.Certificates)-1].AuthorityKeyId)})
		}
		if err := s.source.WaitUntilUpdated(ctx); err != nil {
			return nil // told to end
		}
	}
}

func (s *demoService) peer(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(s.domain, "/"+name)
}

// serve answers requests of shop, and of nobody else.
func (s *demoService) serve(ctx context.Context) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{
		TLSConfig:         tlsconfig.MTLSServerConfig(s.source, s.source, tlsconfig.AuthorizeID(s.peer("shop"))),
		ReadHeaderTimeout: demoPatience,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "in stock\n") // the client counts what fails
		}),
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(ctx) })
	g.Go(func() error {
		if err := server.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return server.Close()
	})
	s.tell(demoEvent{Address: listener.Addr().String()})
	return g.Wait()
}

// call sends requests to stock until it is told to end, and counts them.
func (s *demoService) call(ctx context.Context, address string) error {
	client := &http.Client{Timeout: demoPatience, Transport: &http.Transport{
		TLSClientConfig:   tlsconfig.MTLSClientConfig(s.source, s.source, tlsconfig.AuthorizeID(s.peer("stock"))),
		DisableKeepAlives: true, // every request is a handshake
	}}
	var mu sync.Mutex
	var sum demoEvent
	g, follow := errgroup.WithContext(ctx)
	g.Go(func() error { return s.follow(follow) })
	for range demoCallers {
		g.Go(func() error {
			pace := time.NewTicker(demoPace)
			defer pace.Stop()
			for {
				err := request(client, address)
				mu.Lock()
				sum.Made++
				if err != nil {
					sum.Failed++
					if sum.Error == "" {
						sum.Error = err.Error()
					}
				}
				mu.Unlock()
				select {
				case <-pace.C:
				case <-ctx.Done(): // between two requests: none is cut off
					return nil
				}
			}
		})
	}
	g.Go(func() error {
		report := time.NewTicker(demoReport)
		defer report.Stop()
		for {
			select {
			case <-report.C:
				mu.Lock()
				now := sum
				mu.Unlock()
				s.tell(now)
			case <-ctx.Done():
				return nil
			}
		}
	})
	err := g.Wait()
	sum.Done = true
	s.tell(sum)
	return err
}

func request(client *http.Client, address string) error {
	resp, err := client.Get("https://" + address + "/apples")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("stock answered %s", resp.Status)
	}
	return nil
}
