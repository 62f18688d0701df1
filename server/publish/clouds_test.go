package publish_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/test/harness"
)

// clouds are those that there are, each with a bucket. The prefix of names in it is
// tenant.
var clouds = map[string]func(t *testing.T, b *harness.Bucket) publish.Config{
	"s3": func(t *testing.T, b *harness.Bucket) publish.Config {
		server := httptest.NewServer(b.S3("AKIDSERVER", "secret of the server"))
		t.Cleanup(server.Close)
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIDSERVER")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "secret of the server")
		t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
		return publish.Config{S3: &publish.S3Config{Bucket: "ids", Region: "eu-central-1", Prefix: "tenant", Endpoint: server.URL}}
	},
	"gcs": func(t *testing.T, b *harness.Bucket) publish.Config {
		google := harness.NewGCP(t, harness.GCPInstance{})
		tokens, server := httptest.NewServer(google.API()), httptest.NewServer(b.GCS())
		t.Cleanup(tokens.Close)
		t.Cleanup(server.Close)
		t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", google.AccountFile(t, tokens.URL+"/token"))
		return publish.Config{GCS: &publish.GCSConfig{Bucket: "ids", Prefix: "tenant", Endpoint: server.URL}}
	},
	"azure": func(t *testing.T, b *harness.Bucket) publish.Config {
		azure.Do(func() { // tokens are kept for the life of the process
			azureCloud = harness.NewAzure(t, harness.AzureMachine{Tenant: "t", Principal: "p"}, "127.0.0.1:1")
			azureIdentity = httptest.NewServer(azureCloud.Identity(t))
		})
		server := httptest.NewServer(b.Azure(azureCloud))
		t.Cleanup(server.Close)
		t.Setenv("IDENTITY_ENDPOINT", azureIdentity.URL+"/msi/token")
		t.Setenv("IDENTITY_HEADER", harness.AzureIdentityHeader)
		return publish.Config{AzureBlob: &publish.AzureBlobConfig{Account: "account", Container: "ids", Prefix: "tenant", Endpoint: server.URL}}
	},
}

var (
	azure         sync.Once
	azureCloud    *harness.Azure
	azureIdentity *httptest.Server
)

// everyCloud runs a test with each.
func everyCloud(t *testing.T, test func(t *testing.T, b *harness.Bucket, c publish.Config)) {
	for name, start := range clouds {
		t.Run(name, func(t *testing.T) {
			b := harness.NewBucket()
			test(t, b, everything(start(t, b)))
		})
	}
}

func TestABucketHasTheDocumentsWithTheirTypeAndAge(t *testing.T) {
	everyCloud(t, func(t *testing.T, b *harness.Bucket, c publish.Config) {
		source := newSource(newBundle(t, 7, "k1"))
		w := newWorld(t, "main", source, c)
		for n := uint64(7); n < 10; n++ {
			must(t, w.Publish(t.Context()))
			for _, path := range paths {
				o := b.Object("tenant/" + path)
				age := "public, max-age=300"
				if path == "bundle.json" {
					age = "public, max-age=150"
				}
				if sequence(t, []byte(o.Text)) != n || o.Type != "application/json" || o.Cache != age {
					t.Errorf("%s is %+v", path, o)
				}
			}
			writes := b.Writes()
			must(t, w.Publish(t.Context()))
			if b.Writes() != writes {
				t.Error("what is there is written again")
			}
			source.set(with(t, source.bundle, fmt.Sprint("more", n)))
		}
		if s := w.Targets()[0]; s.State != publish.Current || !strings.Contains(s.Place, "ids/tenant") {
			t.Errorf("the target is %+v", s)
		}
	})
}

func TestWhatSomebodyDeletedOrChangedInABucketIsPutBack(t *testing.T) {
	everyCloud(t, func(t *testing.T, b *harness.Bucket, c publish.Config) {
		w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), c)
		must(t, w.Publish(t.Context()))
		good := b.Object("tenant/keys")
		for n, spoiled := range []harness.BucketObject{
			{}, // gone
			{Text: `{"keys":[]}`, Type: good.Type, Cache: good.Cache},
			{Text: `{"keys":[],"spiffe_sequence":3}`, Type: good.Type, Cache: good.Cache},
			{Text: "<html>", Type: good.Type, Cache: good.Cache},
			{Text: good.Text, Type: "text/html", Cache: good.Cache},
			{Text: good.Text, Type: good.Type, Cache: "max-age=1000000"},
		} {
			b.Put("tenant/keys", spoiled)
			must(t, w.Publish(t.Context()))
			if o := b.Object("tenant/keys"); o.Text != good.Text || o.Type != good.Type || o.Cache != good.Cache {
				t.Errorf("in the place of %+v there is %+v", spoiled, o)
			}
			if got := w.value(t, "hallmark_server_publish_repairs_total", ""); got != float64(n+1) {
				t.Errorf("after %d repairs %v are counted", n+1, got)
			}
		}
	})
}

func TestOfThreeServersNoneOverwritesANewerDocumentInABucket(t *testing.T) {
	everyCloud(t, func(t *testing.T, b *harness.Bucket, c publish.Config) {
		// They learn of changes at different times: each is behind at times.
		bundles := newBundle(t, 1, "k1")
		var all []*world
		for _, name := range []string{"a", "b", "c"} {
			all = append(all, newWorld(t, name, newSource(bundles), c))
		}
		for n := range 10 {
			bundles = with(t, bundles, fmt.Sprint("more", n))
			all[n%3].set(bundles)
			var running sync.WaitGroup
			for _, w := range all {
				running.Go(func() { _ = w.Publish(t.Context()) })
			}
			running.Wait()
			for _, path := range paths {
				if got := sequence(t, []byte(b.Object("tenant/"+path).Text)); got != bundles.SequenceNumber {
					t.Fatalf("%s has the sequence number %d, and there was %d", path, got, bundles.SequenceNumber)
				}
			}
		}
	})
}

// TestAWriteInThePlaceOfSomethingElseIsNotMade has another server write between
// reading and writing.
func TestAWriteInThePlaceOfSomethingElseIsNotMade(t *testing.T) {
	for _, there := range []bool{false, true} {
		everyCloud(t, func(t *testing.T, b *harness.Bucket, c publish.Config) {
			old := newBundle(t, 7, "k1")
			newer := with(t, with(t, old, "k2"), "k3")
			if there {
				must(t, newWorld(t, "first", newSource(old), c).Publish(t.Context()))
			}
			ahead := newWorld(t, "ahead", newSource(newer), c)
			behind := newWorld(t, "behind", newSource(with(t, old, "k2")), c)
			var once sync.Once
			b.Break(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodGet { // the first write of the one that is behind
					once.Do(func() {
						b.Break(nil)
						must(t, ahead.Publish(t.Context()))
					})
				}
				b.Pass(w, r)
			})
			must(t, behind.Publish(t.Context()))
			for _, path := range paths {
				if got := sequence(t, []byte(b.Object("tenant/"+path).Text)); got != 9 {
					t.Errorf("%s has the sequence number %d", path, got)
				}
			}
			if s := behind.Targets()[0]; s.Sequence != 9 || s.State != publish.Current {
				t.Errorf("the server that is behind says %+v", s)
			}
		})
	}
}

func TestWhatABucketAnswersOtherThanSuccessIsExplained(t *testing.T) {
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://127.0.0.1:1/secret")
			w.WriteHeader(status)
			fmt.Fprint(w, body)
		}
	}
	for name, c := range map[string]struct {
		fault http.HandlerFunc
		says  []string
	}{
		"forbidden":       {answer(403, "<Error><Code>AccessDenied</Code><Message>secret</Message></Error>"), []string{"403 Forbidden (AccessDenied)", "let the server's credentials"}},
		"unauthenticated": {answer(401, ""), []string{"401 Unauthorized", "let the server's credentials"}},
		"failing":         {answer(500, "<html>secret"), []string{"500 Internal Server Error"}},
		"busy":            {answer(503, "<Error><Code>SlowDown</Code></Error>"), []string{"503 Service Unavailable (SlowDown)"}},
		"redirect":        {answer(307, "secret"), []string{"307 Temporary Redirect", "not followed", "is elsewhere"}},
		"always another":  {answer(412, "<Error><Code>PreconditionFailed</Code></Error>"), []string{"412"}},
		"cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Header().Set("ETag", `"x"`)
			fmt.Fprint(w, `{"keys":`)
		}, []string{"unexpected EOF"}},
		"too long": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"x"`)
			fmt.Fprint(w, strings.Repeat("secret", 1<<18))
		}, []string{"longer than"}},
		"slow": {func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, []string{"no answer in time"}},
	} {
		t.Run(name, func(t *testing.T) {
			everyCloud(t, func(t *testing.T, b *harness.Bucket, config publish.Config) {
				config.Issuers = nil // one document is enough
				w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), config)
				b.Break(c.fault)
				err := w.Publish(t.Context())
				if err == nil {
					t.Fatal("it is said to be published")
				}
				s := w.Targets()[0]
				for _, text := range c.says {
					if !strings.Contains(s.Error, text) {
						t.Errorf("the error is %q; it does not say %q", s.Error, text)
					}
				}
				if told := s.Error + w.log.String(); strings.Contains(told, "secret") || strings.Contains(told, "Bearer") {
					t.Errorf("it tells more than it should:\n%s", told)
				}
				if s.State != publish.Failing || w.value(t, "hallmark_server_publish_tries_total", "failed") != 1 || time.Until(s.NextTry) > time.Second {
					t.Errorf("the target is %+v", s)
				}
				b.Break(nil)
				must(t, w.Publish(t.Context()))
			})
		})
	}
}

func TestOfABucketThatIsNotThereTheErrorSaysSo(t *testing.T) {
	everyCloud(t, func(t *testing.T, b *harness.Bucket, c publish.Config) {
		b.Remove(true)
		w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), c)
		if err := w.Publish(t.Context()); err == nil || !strings.Contains(err.Error(), "ids") || !strings.Contains(err.Error(), "make it") {
			t.Errorf("it says %v", err)
		}
		b.Remove(false)
		must(t, w.Publish(t.Context()))
	})
}

func TestWithOtherCredentialsNothingIsWritten(t *testing.T) {
	b := harness.NewBucket()
	c := everything(clouds["s3"](t, b))
	t.Setenv("AWS_SECRET_ACCESS_KEY", "another")
	w := newWorld(t, "main", newSource(newBundle(t, 7, "k1")), c)
	if err := w.Publish(t.Context()); err == nil || !strings.Contains(err.Error(), "403 Forbidden (SignatureDoesNotMatch)") || b.Writes() != 0 {
		t.Errorf("it says %v, and there were %d writes", err, b.Writes())
	}
}

func TestBucketsAreNamedAsTheirCloudsNameThem(t *testing.T) {
	for _, c := range []publish.Config{
		{S3: &publish.S3Config{Bucket: "Ids", Region: "eu-central-1"}},
		{S3: &publish.S3Config{Bucket: "a/../b", Region: "eu-central-1"}},
		{S3: &publish.S3Config{Bucket: "a..b", Region: "eu-central-1"}},
		{S3: &publish.S3Config{Bucket: "ids", Region: "eu-central-1.evil.example/"}},
		{S3: &publish.S3Config{Bucket: "ids"}},
		{S3: &publish.S3Config{Bucket: "ids", Region: "eu-central-1", Prefix: "../x"}},
		{AzureBlob: &publish.AzureBlobConfig{Account: "evil.example/", Container: "ids"}},
		{AzureBlob: &publish.AzureBlobConfig{Account: "account", Container: "$logs"}},
		{GCS: &publish.GCSConfig{Bucket: "ids/../x"}},
		{GCS: &publish.GCSConfig{Bucket: "ids", Prefix: "/x"}},
		{S3: &publish.S3Config{Bucket: "ids", Region: "eu-central-1", Endpoint: "http://s3.example"}},
	} {
		if got := mistakes(everything(c)); got == "" {
			t.Errorf("%+v is taken", c)
		}
	}
}
