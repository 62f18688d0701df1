package api_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/hallmark-id/hallmark/server/api"
)

// reads names what changes and issues nothing; every other method must be
// recorded. One that is new and not named like these is, until it is put here.
var reads = regexp.MustCompile(`/(Get|List|Count|Explain|Lint|Await)\w*$` +
	`|/(SyncAuthorizedEntries|Follow|PostStatus|Check|Watch|ServerReflectionInfo)$`)

// withoutObject are the methods that are about nothing but the caller or the
// server.
var withoutObject = regexp.MustCompile(`/(Prepare\w+Authority|ResetLogLevel|Backup|NewDownstreamX509CA)$`)

// secret is written into every field of a request that may hold one.
const secret = "S3CRET-in-a-request"

// changing returns the methods that are served and change or issue something,
// by full name.
func changing(w *world) (names []string) {
	tcp, admin := api.Services(w.api)
	for _, services := range []map[string]grpc.ServiceInfo{tcp, admin} {
		for service, info := range services {
			for _, m := range info.Methods {
				if name := "/" + service + "/" + m.Name; !reads.MatchString(name) {
					names = append(names, name)
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// invoke calls a method by its name with a request that is empty or full.
func invoke(t *testing.T, conn *grpc.ClientConn, name string, full bool) error {
	t.Helper()
	service, method, _ := strings.Cut(strings.TrimPrefix(name, "/"), "/")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	must(t, err)
	m := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(method))
	req := dynamicpb.NewMessage(m.Input())
	if full {
		fill(req, 4)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: m.IsStreamingClient(), ServerStreams: m.IsStreamingServer()}, name)
	if err != nil {
		return err
	}
	if stream.SendMsg(req) == nil {
		must(t, stream.CloseSend())
	}
	for {
		err := stream.RecvMsg(dynamicpb.NewMessage(m.Output()))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil || !m.IsStreamingServer() {
			return err
		}
	}
}

// fill sets every field, down to a depth.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if of := f.ContainingOneof(); f.IsMap() || of != nil && m.WhichOneof(of) != nil {
			continue
		}
		var v protoreflect.Value
		switch f.Kind() {
		case protoreflect.MessageKind:
			if depth == 0 {
				continue
			}
			if f.IsList() {
				v = m.Mutable(f).List().AppendMutable()
			} else {
				v = m.Mutable(f)
			}
			fill(v.Message(), depth-1)
			continue
		case protoreflect.StringKind:
			v = protoreflect.ValueOfString("x")
			if f.Name() == "token" || f.Name() == "secret" {
				v = protoreflect.ValueOfString(secret)
			}
		case protoreflect.BytesKind:
			v = protoreflect.ValueOfBytes([]byte(secret))
		case protoreflect.Int32Kind:
			v = protoreflect.ValueOfInt32(1)
		case protoreflect.Int64Kind:
			v = protoreflect.ValueOfInt64(1)
		case protoreflect.EnumKind:
			v = protoreflect.ValueOfEnum(1)
		default:
			continue
		}
		if f.IsList() {
			m.Mutable(f).List().Append(v)
		} else {
			m.Set(f, v)
		}
	}
}

func TestEveryCallThatChangesOrIssuesLeavesARecord(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	// Who it is recorded as, by the name that the matrix has for the caller.
	callers := map[string]struct {
		conn *grpc.ClientConn
		who  string
		also string
	}{
		"local":      {conn: w.admin(), who: "caller=local pid="},
		"admin":      {conn: w.connect(w.workload(agent, "/admin", func(e *types.Entry) { e.Admin = true })), who: "caller=admin caller_id=spiffe://example.org/admin "},
		"agent":      {conn: w.connect(agent), who: "caller=agent caller_id=" + agent.id.String() + " "},
		"downstream": {conn: w.connect(w.workload(agent, "/downstream", func(e *types.Entry) { e.Downstream = true })), who: "caller=downstream caller_id=spiffe://example.org/downstream "},
		"none":       {conn: w.connect(nil), who: "caller=anyone address=127.0.0.1:"},
	}
	for _, c := range callers { // connected now, however often the authority of the server changes
		must(t, invoke(t, c.conn, bundlev1.Bundle_GetBundle_FullMethodName, false))
	}
	field := regexp.MustCompile(` (\w+)=`)
	fixed := []string{"level", "msg", "method", "caller", "caller_id", "pid", "uid", "address", "outcome", "took", "error"}
	names, matrix := changing(w), parseMatrix()
	if len(names) < 40 {
		t.Fatalf("only %d methods change or issue something: %v", len(names), names)
	}
	for _, name := range names {
		for _, who := range matrix[name] {
			caller, ok := callers[who]
			if !ok {
				continue // it is let in as others here are
			}
			for _, full := range []bool{false, true} {
				if who != "local" && slices.Contains(matrix[name], "none") { // let in as anyone is
					_, id, known := strings.Cut(caller.who, "caller_id=")
					if caller.who = "caller=anyone address=127.0.0.1:"; known {
						caller.also = "presented=" + id
					}
				}
				before := w.log.lines("msg=audit", "method="+name[1:]+" ")
				err := invoke(t, caller.conn, name, full)
				records := w.log.lines("msg=audit", "method="+name[1:]+" ")[len(before):]
				if len(records) != 1 {
					t.Errorf("%s by %s: %d records of it", name, who, len(records))
					continue
				}
				for _, text := range []string{caller.who, caller.also, " outcome=" + grpcstatus.Code(err).String()} {
					if !strings.Contains(records[0], text) {
						t.Errorf("%s by %s: the record lacks %q:\n%s", name, who, text, records[0])
					}
				}
				if !full || withoutObject.MatchString(name) || grpcstatus.Code(err) == codes.Unimplemented {
					continue
				}
				if !slices.ContainsFunc(field.FindAllStringSubmatch(records[0], -1), func(m []string) bool { return !slices.Contains(fixed, m[1]) }) {
					t.Errorf("%s by %s: the record does not say what it was about:\n%s", name, who, records[0])
				}
			}
		}
	}
	w.expectNoSecret(secret)
}

func TestEveryDeniedAttemptToChangeOrIssueLeavesARecord(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	callers := map[string]*grpc.ClientConn{
		"presented=spiffe://example.org/workload ": w.connect(w.workload(agent, "/workload")),
		"address=127.0.0.1:":                       w.connect(nil),
	}
	for _, conn := range callers {
		must(t, invoke(t, conn, bundlev1.Bundle_GetBundle_FullMethodName, false))
	}
	for _, name := range changing(w) {
		if slices.Contains(parseMatrix()[name], "none") {
			continue // it is for everybody
		}
		w.sleep(time.Second) // what is left out is what comes faster
		for who, conn := range callers {
			before := w.log.lines("msg=audit", "method="+name[1:]+" ", who)
			expectCode(t, invoke(t, conn, name, true), codes.PermissionDenied, "")
			records := w.log.lines("msg=audit", "method="+name[1:]+" ", who)[len(before):]
			if len(records) != 1 || !strings.Contains(records[0], "outcome=PermissionDenied") {
				t.Errorf("%s, denied to %s: the records are %q", name, who, records)
			}
		}
	}
	w.expectNoSecret(secret)
}

func TestRecordsHaveNoTokenAndNoKey(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	chosen := "a-token-that-an-operator-chose"
	_, err := agentv1.NewAgentClient(w.admin()).CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: chosen})
	must(t, err)
	minted, err := svidv1.NewSVIDClient(w.admin()).MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: wireID(id("/a")), Audience: []string{"b"}})
	must(t, err)
	jwt, err := svidv1.NewSVIDClient(w.connect(agent)).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: w.create(agent, "/c").Id, Audience: []string{"d"}})
	must(t, err)
	_, err = attest(t.Context(), w.connect(nil), "join_token", "a-token-that-was-guessed", newCSR(t, newKey(t)))
	expectCode(t, err, codes.InvalidArgument, "")
	_, err = entryv1.NewEntryClient(w.admin()).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"x"}})
	must(t, err)
	if n := len(w.log.lines("msg=audit")); n < 6 {
		t.Fatalf("there are %d records", n)
	}
	w.expectNoSecret(chosen, w.token(), "a-token-that-was-guessed", minted.Svid.Token, jwt.Svid.Token)
}

// expectNoSecret fails the test if the log has one of some secrets in it.
func (w *world) expectNoSecret(secrets ...string) {
	w.t.Helper()
	for _, s := range secrets {
		for _, form := range []string{s, hex.EncodeToString([]byte(s)), base64.StdEncoding.EncodeToString([]byte(s))[:len(s)]} {
			for _, line := range w.log.lines(form) {
				w.t.Errorf("a secret is in the log: %s", line)
			}
		}
	}
}
