// Calls by PostgreSQL's JDBC driver: for each line of standard input, a URL, a line says which server has answered, or
// why none has.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.sql.DriverManager;
import java.sql.SQLException;

class Hosts {
    public static void main(String[] arguments) throws Exception {
        var urls = new BufferedReader(new InputStreamReader(System.in));
        for (String url = urls.readLine(); url != null; url = urls.readLine()) {
            System.out.println(answer(url));
        }
    }

    private static String answer(String url) {
        var asks = "SELECT host(inet_server_addr()) || ' ' || inet_server_port()";
        try (var session = DriverManager.getConnection(url);
                var statement = session.prepareStatement(asks);
                var rows = statement.executeQuery()) {
            rows.next();
            return rows.getString(1);
        } catch (SQLException error) {
            return "error: " + error.getMessage().replace('\n', ' ');
        }
    }
}
